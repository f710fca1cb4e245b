"""Other packages' distillation losses, called as their users call them: KL(pi_theta || pi_d) to one teacher.

None of them has the loss of two teachers. They come with the ``bench`` extra. Shapes: T tokens.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarking.authors import Loss, logits_TV
from benchmarking.problem import Problem


def liger(problem: Problem) -> Loss:
    """liger-kernel's chunked loss with its own defaults (chunks of 1024 tokens, compiled).

    Its generalised Jensen-Shannon divergence at beta = 1 is KL(student || teacher). It averages over tokens and takes
    no weights of tokens.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    divergence = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0)
    policy, teacher = problem.policy, problem.d
    labels_T = torch.zeros(policy.hidden_TH.shape[0], dtype=torch.int64, device=policy.hidden_TH.device)
    return lambda: divergence(
        policy.hidden_TH, policy.weight_VH, teacher.hidden_TH, teacher.weight_VH, true_labels=labels_T
    )


def modelopt(problem: Problem) -> Loss:
    """nvidia-modelopt's Megatron-Core loss on the (sharded) logits [T, 1, V], which its users' output layer makes.

    The masked sum and its reduction over the tensor-parallel group are the ones of Megatron-LM's loss function.
    """
    divergence = _modelopt_loss(1 if problem.group is None else problem.group.size())
    weight_T = torch.full_like(problem.token_weight_T, problem.even_weight)

    def loss() -> Tensor:
        student_T1V = logits_TV(problem.policy)[:, None]
        with torch.no_grad():
            teacher_T1V = logits_TV(problem.d)[:, None]
        losses_1T, reduce_over_group, _ = divergence(student_T1V, teacher_T1V)
        total = (losses_1T.view(-1).float() * weight_T).sum()
        if reduce_over_group and problem.group is not None:
            dist.all_reduce(total, group=problem.group)
        return total

    return loss


@functools.cache
def _modelopt_loss(tensor_parallel: int) -> Any:
    from megatron_aligndistil.parallel import setup

    # Megatron-Core's groups; on a CPU also the runtime without which it can't start there.
    setup.initialize(setup.Layout(tensor=tensor_parallel), seed=0)
    from megatron.core.transformer.transformer_config import TransformerConfig
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    config = TransformerConfig(
        num_layers=1, hidden_size=64, num_attention_heads=2, tensor_model_parallel_size=tensor_parallel
    )
    return LogitsKLLoss(config, reverse=True)  # in its words, KLD(teacher, student) is KL(student || teacher)
