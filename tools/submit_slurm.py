"""``aligndistil launch slurm`` without installing the console script: python tools/submit_slurm.py --config-name …"""

import sys

from megatron_aligndistil.errors import UserError
from megatron_aligndistil.launch import failures
from megatron_aligndistil.launch.log import configure_logging
from megatron_aligndistil.launch.slurm import main

if __name__ == "__main__":
    configure_logging(0)
    try:
        sys.exit(main(["slurm", *sys.argv[1:]]))
    except UserError as error:
        sys.exit(failures.report(error))
