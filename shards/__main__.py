"""`python -m msa_openclip.shards`, or `python -m shards` from a clone."""

import sys

from .command_line import main
from .output import until_unread

if __name__ == "__main__":
    sys.exit(until_unread(main))
