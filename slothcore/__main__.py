"""`python -m slothcore` is the `slothcore` command."""

import sys

from slothcore.cli import main

if __name__ == "__main__":
    sys.exit(main())
