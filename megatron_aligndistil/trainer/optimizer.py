"""The policy under training: Megatron-Core's DDP, optimizer and learning-rate schedule around the model chunks."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_aligndistil.config.base_schema import OptimConfig
from megatron_aligndistil.models.policy import HiddenStateModel
from megatron_aligndistil.parallel import heartbeat

logger = logging.getLogger(__name__)

# NeMo's scheduler names and Megatron-Core's decay styles.
DECAY_STYLES = {"CosineAnnealing": "cosine", "WarmupAnnealing": "linear", "WarmupPolicy": "constant"}


class GradientSync:
    """Megatron-Core's exchange of gradients, which every rank enters when its own are done; ``seconds`` of the last."""

    seconds = 0.0

    def __call__(self, *arguments: Any, **keywords: Any) -> None:
        """Finish the gradients of a step."""
        torch.cuda.synchronize()
        heartbeat.beat("gradient_sync")
        start = time.perf_counter()
        finalize_model_grads(*arguments, **keywords)
        torch.cuda.synchronize()
        self.seconds = time.perf_counter() - start


@dataclass
class TrainedModel:
    """``chunks`` are the bare models, ``wrapped`` the same in DDP (what the schedule runs)."""

    chunks: list[HiddenStateModel]
    wrapped: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    gradient_sync: GradientSync

    def zero_grad(self) -> None:
        """Clear gradients and DDP's buffers."""
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()


def wrap(chunks: Sequence[HiddenStateModel], distributed_optimizer: bool) -> list[DistributedDataParallel]:
    """The chunks in Megatron-Core's DDP; gradients are summed, in fp32 for bf16 weights."""
    dtype = chunks[0].config.params_dtype
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=dtype is torch.bfloat16,
        use_distributed_optimizer=distributed_optimizer,
        overlap_grad_reduce=False,
    )
    wrapped = [
        DistributedDataParallel(chunk.config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    sync = GradientSync()
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = sync
    return wrapped


def prepare(chunks: Sequence[HiddenStateModel], optim: OptimConfig, clip_grad: float, total_steps: int) -> TrainedModel:
    """DDP, optimizer and schedule for ``chunks``, whose weights are loaded: the fp32 copies start from them."""
    distributed = optim.name == "distributed_fused_adam"
    wrapped = wrap(chunks, distributed)
    bf16 = chunks[0].config.params_dtype is torch.bfloat16
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            min_lr=optim.sched.min_lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.betas[0],
            adam_beta2=optim.betas[1],
            adam_eps=optim.eps,
            clip_grad=clip_grad,
            bf16=bf16,
            params_dtype=chunks[0].config.params_dtype,
            use_distributed_optimizer=distributed,
        ),
        wrapped,
    )
    chunks[0].config.grad_scale_func = optimizer.scale_loss
    sync = chunks[0].config.finalize_model_grads_func
    return TrainedModel(list(chunks), wrapped, optimizer, _scheduler(optimizer, optim, total_steps), sync)


def _scheduler(optimizer: MegatronOptimizer, optim: OptimConfig, total_steps: int) -> OptimizerParamScheduler:
    steps = max(total_steps, 1)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.sched.min_lr,
        lr_warmup_steps=warmup_steps(optim, total_steps),
        lr_decay_steps=steps,
        lr_decay_style=DECAY_STYLES[optim.sched.name],
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
    )


def warmup_steps(optim: OptimConfig, total_steps: int) -> int:
    """Steps of linear warm-up; at least one step is left to train at the full rate."""
    asked = optim.sched.warmup_steps
    if asked is None:
        asked = round((optim.sched.warmup_ratio or 0.0) * total_steps)
    return max(0, min(asked, total_steps - 1))
