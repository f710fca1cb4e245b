"""``aligndistil convert`` without installing the console script: python tools/convert_checkpoint.py INPUT OUTPUT."""

import sys

from megatron_aligndistil.checkpoint.convert import main

if __name__ == "__main__":
    sys.exit(main())
