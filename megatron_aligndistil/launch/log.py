"""Log lines on stderr: everything from rank 0, warnings and worse from the others, which name their rank."""

from __future__ import annotations

import logging
import sys
import warnings

_PACKAGE = "megatron_aligndistil"


class _Handler(logging.StreamHandler):
    """Ours among the root logger's handlers, so that configuring twice does not print twice."""


def configure_logging(rank: int) -> None:
    """Set the root handler and this package's level for a process of global ``rank``."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _Handler)]:
        root.removeHandler(handler)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler = _Handler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)-7s {prefix}%(message)s", datefmt="%H:%M:%S"))
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger(_PACKAGE).setLevel(logging.INFO if rank == 0 else logging.WARNING)
    # Every rank would print a dozen of Megatron-Core's on import; our own line says which implementations were chosen.
    warnings.filterwarnings("ignore", r".*(Apex|Transformer Engine).* not installed", UserWarning, r"megatron\.core\.")
