"""`python -m msa_openclip.shards`, or `python -m shards` from a clone: the command `msa-openclip shards`."""

import sys

from .command_line import main

if __name__ == "__main__":
    sys.exit(main())
