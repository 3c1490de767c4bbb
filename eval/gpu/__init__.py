"""One run on a GPU: whether chunkcache is right there, how fast it is, and what limits it.

`python -m chunkcache.eval.gpu` needs no network and no weights. It makes its own models and tokenizer, keeps to a
time budget for each section, prints each figure as it comes, and ends with tables in Markdown. `--smoke` runs all of
it on the CPU with toy sizes. What was run where is in docs/gpu.md.
"""
