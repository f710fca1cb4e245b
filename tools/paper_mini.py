"""The paper in miniature: python tools/paper_mini.py; ``make paper-mini`` and examples/paper_mini tell more."""

import sys

from megatron_aligndistil.errors import UserError
from megatron_aligndistil.launch import failures
from megatron_aligndistil.launch.paper_mini import main

if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(failures.report(error))
