"""``python -m hpc_hess``."""

import sys

from hpc_hess.cli import main

if __name__ == "__main__":
    sys.exit(main())
