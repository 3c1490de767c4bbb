"""`python -m chunkcache` is the command line."""

from chunkcache.cli import main

main()
