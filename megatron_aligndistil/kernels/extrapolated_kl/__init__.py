"""KL divergence to the distribution extrapolated from two teachers (paper Eq. 16-19)."""

from megatron_aligndistil.kernels.extrapolated_kl.dispatch import (
    extrapolated_kl,
    summed_statistics,
    teacher_scalars,
    token_statistics,
)
from megatron_aligndistil.kernels.extrapolated_kl.values import (
    ExtrapolatedKL,
    Extrapolation,
    Teacher,
    TeacherScalars,
    TokenStatistics,
)

__all__ = [
    "ExtrapolatedKL",
    "Extrapolation",
    "Teacher",
    "TeacherScalars",
    "TokenStatistics",
    "extrapolated_kl",
    "summed_statistics",
    "teacher_scalars",
    "token_statistics",
]
