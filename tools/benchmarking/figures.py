"""The kernels' benchmark as a picture: a row of panels a problem, time on the left and memory on the right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarking.rows import Row

OURS, YARDSTICK_COLOR, PEERS = "#1f6feb", "#57606a", "#d0a215"
BAR_INCHES, PANEL_INCHES = 0.26, 0.9


def plot_kernels(rows: Sequence[Row], target: str) -> None:
    """Bars of seconds and of extra bytes; an implementation that failed has neither."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    problems: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        problems.setdefault((row["shape"], row["dtype"], row["tensor_parallel"]), []).append(row)
    heights = [PANEL_INCHES + BAR_INCHES * len(panel) for panel in problems.values()]
    figure, axes = pyplot.subplots(
        len(problems), 2, figsize=(11, sum(heights) + 0.8), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for (left, right), ((shape, dtype, ranks), panel) in zip(axes, problems.items(), strict=True):
        tokens, hidden, vocab = str(shape).split(",")
        title = f"T={tokens} H={hidden} V={vocab} {dtype}" + (f" TP={ranks}" if ranks > 1 else "")
        times = [(row["seconds"], _label(row["seconds"], row["times_bare_products"])) for row in panel]
        memory = [_mebibytes(row["extra_bytes"]) for row in panel]
        _bars(left, panel, times)
        _bars(right, panel, memory)
        left.set_title(f"{title}\nseconds (multiple of the bare products)", fontsize=9, loc="left")
        right.set_title("peak extra MiB, logarithmic", fontsize=9, loc="left")
        right.set_xscale("symlog", linthresh=1)
        right.set_xlim(left=0)
        right.set_yticklabels([])
    about = sorted({f"{row['device']}, {row['threads']} threads; {row['versions']}" for row in rows})
    figure.supxlabel("\n".join(about), fontsize=6)
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, metadata={"Date": None} if target.endswith(".svg") else None)
    pyplot.close(figure)


def _bars(axis: Any, panel: Sequence[Row], values: Sequence[tuple[float | None, str]]) -> None:
    names = [str(row["implementation"]) for row in panel]
    bars = axis.barh(names, [width or 0 for width, _ in values], color=[_color(name) for name in names])
    axis.bar_label(bars, labels=[label for _, label in values], fontsize=7, padding=2)
    axis.invert_yaxis()
    axis.margins(x=0.25)
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)


def _color(name: str) -> str:
    return OURS if name.startswith("ours") else YARDSTICK_COLOR if name == "five_products" else PEERS


def _label(seconds: float | None, multiple: float | None) -> str:
    if seconds is None:
        return "not measured"
    return f"{seconds:.3g}" + (f" ({multiple:.2f})" if multiple is not None else "")


def _mebibytes(extra: int | None) -> tuple[float | None, str]:
    return (None, "not measured") if extra is None else (extra / 2**20, f"{extra / 2**20:,.0f}")
