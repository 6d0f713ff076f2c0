"""`python -m gemlax.cli`."""

import sys

from gemlax.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
