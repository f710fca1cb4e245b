"""AlignDistil's loss the plain way: dense PyTorch that autograd differentiates.

``authors_loss`` is the formulation of the paper's Eq. 16 to 18 as one writes it on whole logits: in the models' type,
softmaxes in float32. ``shard_loss`` is the same on a vocabulary shard with reductions of O(T). Neither chunks.

Shapes: T tokens, H hidden size, V vocabulary entries (of the shard).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.nn.functional import all_reduce as differentiable_all_reduce

from benchmarking.problem import ALPHA, EPSILON, Model, Problem

Loss = Callable[[], Tensor]


def logits_TV(model: Model) -> Tensor:
    """Logits in the model's own type."""
    return model.hidden_TH @ model.weight_VH.t()


def dense_token_kl(policy_TV: Tensor, d_TV: Tensor, r_TV: Tensor) -> tuple[Tensor, Tensor]:
    """(KL(pi_theta || softmax z*), alpha) of each position, [...], from three models' logits [..., V] of any type."""
    with torch.no_grad():
        alpha_T = ALPHA * _tvd(d_TV, r_TV) + EPSILON
        target_TV = torch.log_softmax(d_TV + alpha_T[..., None] * (d_TV - r_TV), -1, dtype=torch.float32)
    logprob_TV = torch.log_softmax(policy_TV, -1, dtype=torch.float32)
    return (logprob_TV.exp() * (logprob_TV - target_TV)).sum(-1), alpha_T


def _tvd(d_TV: Tensor, r_TV: Tensor) -> Tensor:
    probability_d_TV = torch.softmax(d_TV, -1, dtype=torch.float32)
    probability_r_TV = torch.softmax(r_TV, -1, dtype=torch.float32)
    return 0.5 * (probability_d_TV - probability_r_TV).abs().sum(-1)


def authors_loss(policy: Model, d: Model, r: Model, token_weight_T: Tensor) -> Tensor:
    """The loss from hidden states and heads, three whole logit matrices at once."""
    policy_TV = logits_TV(policy)
    with torch.no_grad():
        d_TV, r_TV = logits_TV(d), logits_TV(r)
    kl_T, _ = dense_token_kl(policy_TV, d_TV, r_TV)
    return (token_weight_T * kl_T).sum()


def authors(problem: Problem) -> Loss:
    """Eager."""
    return lambda: authors_loss(problem.policy, problem.d, problem.r, problem.token_weight_T)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    def from_tensors(*tensors: Tensor) -> Tensor:
        *halves, token_weight_T = tensors
        policy, d, r = (Model(*halves[i : i + 2]) for i in (0, 2, 4))
        return authors_loss(policy, d, r, token_weight_T)

    return torch.compile(from_tensors, dynamic=False)


def authors_compiled(problem: Problem) -> Loss:
    """The same function under ``torch.compile``, products and backward pass included."""
    tensors = [t for model in (problem.policy, problem.d, problem.r) for t in (model.hidden_TH, model.weight_VH)]
    return lambda: _compiled()(*tensors, problem.token_weight_T)


def authors_reverse_kl(problem: Problem) -> Loss:
    """KL(pi_theta || pi_d) of one teacher, dense and eager."""

    def loss() -> Tensor:
        with torch.no_grad():
            target_TV = torch.log_softmax(logits_TV(problem.d), -1, dtype=torch.float32)
        logprob_TV = torch.log_softmax(logits_TV(problem.policy), -1, dtype=torch.float32)
        return (logprob_TV.exp() * (logprob_TV - target_TV)).sum() * problem.even_weight

    return loss


def local_shard_eager(problem: Problem) -> Loss:
    """On a vocabulary shard: whole [T, V / TP] tensors in float32, and O(T) words a collective."""
    return lambda: shard_loss(problem)


def shard_loss(problem: Problem) -> Tensor:
    """The loss's value over all shards; its gradient with respect to this shard's logits."""
    group = problem.group
    with torch.no_grad():
        logprob_d_TV = _normalised(logits_TV(problem.d).float(), group)
        logprob_r_TV = _normalised(logits_TV(problem.r).float(), group)
        tvd_T = _reduced(0.5 * (logprob_d_TV.exp() - logprob_r_TV.exp()).abs().sum(-1), group, dist.ReduceOp.SUM)
        alpha_T = ALPHA * tvd_T + EPSILON
        target_TV = _normalised(logprob_d_TV + alpha_T[:, None] * (logprob_d_TV - logprob_r_TV), group)
    policy_TV = logits_TV(problem.policy).float()
    shifted_TV = policy_TV - _reduced(policy_TV.detach().amax(-1), group, dist.ReduceOp.MAX)[:, None]
    sum_T = shifted_TV.exp().sum(-1)
    if group is not None:
        sum_T = differentiable_all_reduce(sum_T, group=group)
    logprob_TV = shifted_TV - sum_T.log()[:, None]
    part_T = (logprob_TV.exp() * (logprob_TV - target_TV)).sum(-1)
    part = (problem.token_weight_T * part_T).sum()
    # The value is summed over the shards outside autograd: each rank's gradient comes from its own part, and the
    # normaliser's backward pass has summed what the other parts contribute.
    return part + (_reduced(part.detach().clone(), group, dist.ReduceOp.SUM) - part.detach())


def _normalised(logits_TV: Tensor, group: ProcessGroup | None) -> Tensor:
    shifted_TV = logits_TV - _reduced(logits_TV.amax(-1), group, dist.ReduceOp.MAX)[:, None]
    return shifted_TV - _reduced(shifted_TV.exp().sum(-1), group, dist.ReduceOp.SUM).log()[:, None]


def _reduced(values: Tensor, group: ProcessGroup | None, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if group is not None:
        dist.all_reduce(values, operation, group=group)
    return values
