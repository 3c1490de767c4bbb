"""`python -m chunkcache.eval.gpu`."""

from chunkcache.eval.gpu.main import main

if __name__ == "__main__":
    main()
