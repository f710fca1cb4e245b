"""What goes into the op and what comes out. Shapes: T tokens, H a model's hidden size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_aligndistil.types import VocabHead


@dataclass(frozen=True)
class Extrapolation:
    """How far z* = z_d + alpha_t (z_d - z_r) goes beyond z_d (paper Eq. 16, 17; Table 3 for ``constant``).

    adaptive: alpha_t = alpha * tvd_scale * TVD_t + epsilon; tvd_scale = 2 is the authors' TVD, without the factor 1/2
    constant: alpha_t = alpha
    """

    mode: Literal["adaptive", "constant"]
    alpha: float
    epsilon: float
    tvd_scale: float

    def __post_init__(self) -> None:
        if self.mode not in ("adaptive", "constant"):
            raise ValueError(f"mode must be 'adaptive' or 'constant', got {self.mode!r}")

    def alpha_of(self, tvd_T: Tensor) -> Tensor:
        """alpha_t [T] from TVD_t = 1/2 sum |pi_d - pi_r| in [0, 1]."""
        if self.mode == "constant":
            return torch.full_like(tvd_T, self.alpha)
        return self.alpha * self.tvd_scale * tvd_T + self.epsilon


@dataclass(frozen=True)
class TeacherScalars:
    """What the policy's step needs of the teachers beside their hidden states; [T] float32 (float64) each, nats.

    log_z_d, log_z_r  log-normalisers of the teachers' logits
    tvd               1/2 sum |pi_d - pi_r|
    alpha             the extrapolation's coefficient
    log_z_star        log sum exp(log pi_d + alpha (log pi_d - log pi_r)), so never negative (up to rounding)
    """

    log_z_d: Tensor
    log_z_r: Tensor
    tvd: Tensor
    alpha: Tensor
    log_z_star: Tensor


@dataclass(frozen=True)
class Teacher:
    """The target softmax z* at T tokens: last hidden states [T, H] and heads of the DPO (d) and reference (r) model."""

    hidden_d_TH: Tensor
    head_d: VocabHead
    hidden_r_TH: Tensor
    head_r: VocabHead
    scalars: TeacherScalars


@dataclass(frozen=True)
class ExtrapolatedKL:
    """Per token, [T] float32 (float64) each, in nats. Only ``kl`` is differentiable.

    kl           KL(pi_theta || softmax z*), not yet times beta_t
    reward_part  this shard's part of E_{v ~ pi_theta}[log pi_d(v) - log pi_r(v)]: the shards' parts add up to it. It
                 costs no word on the wire; ``token_statistics`` and ``summed_statistics`` do the adding. None where
                 statistics were not asked for.
    """

    kl: Tensor
    reward_part: Tensor | None


@dataclass(frozen=True)
class TokenStatistics:
    """In nats, per token [T] or summed over tokens.

    kl_to_d  KL(pi_theta || pi_d)
    kl_to_r  KL(pi_theta || pi_r)
    reward   E_{v ~ pi_theta}[log pi_d(v) - log pi_r(v)], the expected contrastive reward before its factor beta_0
    """

    kl_to_d: Tensor
    kl_to_r: Tensor
    reward: Tensor
