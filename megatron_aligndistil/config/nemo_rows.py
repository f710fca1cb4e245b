"""What a row of the table of NeMo-Aligner's keys says."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_aligndistil.config.nemo_conversions import Agreed, Conversion, Refused, unchanged

SECTION = "trainer.<section>"


@dataclass(frozen=True)
class Row:
    """Keys of NeMo-Aligner's that are treated alike.

    ours     our key for the only one of ``nemo``; "" where ``convert`` names the keys, or where there is none
    convert  None: always left out, for the reason that ``note`` gives
    """

    nemo: tuple[str, ...]
    ours: str
    convert: Conversion | None
    note: str = ""


def moved(nemo: str, ours: str = "", by: Conversion = unchanged, note: str = "") -> Row:
    """A key that has an equal here, under the same name unless ``ours`` is given."""
    return Row((nemo,), ours or nemo, by, note)


def decides(nemo: str, by: Conversion, note: str) -> Row:
    """A key on which others than one of ours depend, as ``by`` says."""
    return Row((nemo,), "", by, note)


def same(prefix: str, *names: str, by: Conversion = unchanged) -> list[Row]:
    """Keys with the same names and meanings here."""
    return [moved(f"{prefix}{name}", by=by) for name in names]


def holds(prefix: str, names: str, *values: object, otherwise: str) -> Row:
    """Keys that say what is so here anyway with one of ``values``; any other is left out, because ``otherwise``."""

    def judge(value: object, file: object) -> object:
        if any(value == known and isinstance(value, bool) is isinstance(known, bool) for known in values):
            raise Agreed("it is so here")
        raise Refused(otherwise)

    shown = " or ".join("null" if value is None else str(value).lower() for value in values)
    return Row(_under(prefix, names), "", judge, f"{shown}: it is so here; else no equal: {otherwise}")


def left_out(prefix: str, names: str, reason: str) -> Row:
    """Keys without an equal."""
    return Row(_under(prefix, names), "", None, reason)


def _under(prefix: str, names: str) -> tuple[str, ...]:
    return tuple(f"{prefix}{name}" for name in names.split())
