"""Figure 2 from training runs: python tools/compare_convergence.py RUNS; examples/convergence trains them."""

import sys

from megatron_aligndistil.errors import UserError
from megatron_aligndistil.launch import failures
from megatron_aligndistil.report.convergence import main

if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(failures.report(error))
