"""`python -m cluster` is the same as `zeroray`."""

import sys

from cluster.cli import main

if __name__ == "__main__":
    sys.exit(main())
