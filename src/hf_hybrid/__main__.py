"""`python -m hf_hybrid`: the console command where it is not on the path, and below launchers such as torchrun."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
