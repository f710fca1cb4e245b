"""Dense float64 scalars and KL straight from the paper's equations 16 to 18; independent of the sharded form.

Shapes: T tokens, H a model's hidden size, V the whole vocabulary. Weights are whole padded heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_aligndistil.kernels.extrapolated_kl.values import Extrapolation, TeacherScalars, TokenStatistics


@dataclass(frozen=True)
class DenseModel:
    """Hidden states [T, H] and a whole head [V_padded, H] with ``vocab_size`` true entries."""

    hidden_TH: Tensor
    weight_VH: Tensor
    vocab_size: int

    def logits_TV(self) -> Tensor:
        return self.hidden_TH.double() @ self.weight_VH[: self.vocab_size].double().t()


def dense_teacher_scalars(d: DenseModel, r: DenseModel, extrapolation: Extrapolation) -> TeacherScalars:
    """The teachers' scalars, [T] float64."""
    logits_d_TV, logits_r_TV = d.logits_TV().detach(), r.logits_TV().detach()
    tvd_T = (logits_d_TV.softmax(-1) - logits_r_TV.softmax(-1)).abs().sum(-1) / 2
    alpha_T = extrapolation.alpha_of(tvd_T)
    logprob_d_TV, logprob_r_TV = logits_d_TV.log_softmax(-1), logits_r_TV.log_softmax(-1)
    return TeacherScalars(
        log_z_d=logits_d_TV.logsumexp(-1),
        log_z_r=logits_r_TV.logsumexp(-1),
        tvd=tvd_T,
        alpha=alpha_T,
        log_z_star=(logprob_d_TV + alpha_T[:, None] * (logprob_d_TV - logprob_r_TV)).logsumexp(-1),
    )


def dense_extrapolated_kl(policy: DenseModel, d: DenseModel, r: DenseModel, extrapolation: Extrapolation) -> Tensor:
    """KL to softmax(z_d + alpha_t (z_d - z_r)) of raw logits, [T] float64, differentiable by autograd."""
    logits_d_TV, logits_r_TV = d.logits_TV().detach(), r.logits_TV().detach()
    alpha_T1 = dense_teacher_scalars(d, r, extrapolation).alpha[:, None]
    target_TV = (logits_d_TV + alpha_T1 * (logits_d_TV - logits_r_TV)).log_softmax(-1)
    logprob_TV = policy.logits_TV().log_softmax(-1)
    return (logprob_TV.exp() * (logprob_TV - target_TV)).sum(-1)


def dense_token_statistics(policy: DenseModel, d: DenseModel, r: DenseModel) -> TokenStatistics:
    """Divergences to the teachers and the expected reward, [T] float64."""
    logprob_d_TV, logprob_r_TV = (model.logits_TV().detach().log_softmax(-1) for model in (d, r))
    logprob_TV = policy.logits_TV().detach().log_softmax(-1)
    probability_TV = logprob_TV.exp()
    return TokenStatistics(
        kl_to_d=(probability_TV * (logprob_TV - logprob_d_TV)).sum(-1),
        kl_to_r=(probability_TV * (logprob_TV - logprob_r_TV)).sum(-1),
        reward=(probability_TV * (logprob_d_TV - logprob_r_TV)).sum(-1),
    )
