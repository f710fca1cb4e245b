"""KL divergence to the distribution extrapolated from two teachers (paper Eq. 16-19)."""

from megatron_aligndistil.kernels.extrapolated_kl.dispatch import extrapolated_kl, teacher_scalars
from megatron_aligndistil.kernels.extrapolated_kl.values import (
    ExtrapolatedKL,
    Extrapolation,
    Teacher,
    TeacherScalars,
)

__all__ = ["ExtrapolatedKL", "Extrapolation", "Teacher", "TeacherScalars", "extrapolated_kl", "teacher_scalars"]
