"""``python -m megatron_aligndistil`` is the program ``aligndistil``."""

import sys

from megatron_aligndistil.launch.cli import main

if __name__ == "__main__":
    sys.exit(main())
