"""`python -m chunkcache` is the command line."""

from chunkcache.cli.main import main

main()
