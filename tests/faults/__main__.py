"""`python -m tests.faults`: see `matrix.main`."""

from .matrix import main

if __name__ == "__main__":
    main()
