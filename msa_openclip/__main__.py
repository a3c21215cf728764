"""`python -m msa_openclip COMMAND`: the command `msa-openclip`."""

import sys

from .commands.main import main

if __name__ == "__main__":
    sys.exit(main())
