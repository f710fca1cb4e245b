"""The two sides of the step's benchmark: this package's trainer, and the same step written plainly on transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarking import meter
from benchmarking.authors import dense_token_kl
from benchmarking.problem import ALPHA, EPSILON
from benchmarking.step_problem import ADAM_EPS, BETA0, BETAS, CLIP, LEARNING_RATE, StepProblem, StepReply


class Side:
    """One side, in a process of its own."""

    device = torch.device("cpu")

    def __init__(self, problem: StepProblem, rank: int = 0) -> None:
        raise NotImplementedError

    def step(self) -> float:
        """One optimizer step; returns its loss."""
        raise NotImplementedError

    def warm_up(self) -> StepReply:
        """The first step, whose loss is that of the weights as given."""
        return StepReply(loss=self.step())

    def time(self) -> StepReply:
        """One timed step."""
        losses: list[float] = []
        seconds = meter.seconds(lambda: losses.append(self.step()), self.device)
        meter.trim()
        return StepReply(seconds=seconds, loss=losses[0])

    def memory(self) -> StepReply:
        """The peak of the second step of a fresh process; the first one makes the optimizer's state."""
        meter.return_freed_memory()
        self.step()
        peak = meter.peak(self.step, self.device)
        return StepReply(resident_bytes=peak.before, peak_bytes=peak.highest)


class Plain(Side):
    """AutoModelForCausalLM for the policy and two frozen teachers, the authors' dense loss, torch's AdamW.

    In bf16 the policy's weights are fp32 under autocast, and the teachers are loaded in bf16.
    """

    def __init__(self, problem: StepProblem, rank: int = 0) -> None:
        from transformers import AutoModelForCausalLM

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.problem = problem
        half = torch.bfloat16 if problem.bf16 else torch.float32
        load = AutoModelForCausalLM.from_pretrained
        policy, dpo, reverse_dpo = problem.models
        self.policy = load(policy, dtype=torch.float32).to(self.device).train()
        self.teachers = [load(path, dtype=half).to(self.device).eval() for path in (dpo, reverse_dpo)]
        if problem.recompute == "both":
            self.policy.gradient_checkpointing_enable()
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(), lr=LEARNING_RATE, betas=BETAS, eps=ADAM_EPS, weight_decay=0.0
        )
        tokens_BS = torch.from_numpy(problem.tokens(self.policy.config.vocab_size)).long().to(self.device)
        self.micro_batches = tokens_BS.split(problem.micro_batch)

    def step(self) -> float:
        self.optimizer.zero_grad()
        total = 0.0
        for tokens_BS in self.micro_batches:
            loss = self._loss(tokens_BS)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), CLIP)
        self.optimizer.step()
        return total

    def _loss(self, tokens_BS: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.problem.bf16):
            policy_BSV = self.policy(tokens_BS, use_cache=False).logits
            with torch.no_grad():
                d_BSV, r_BSV = (teacher(tokens_BS, use_cache=False).logits for teacher in self.teachers)
        kl_BS, alpha_BS = dense_token_kl(policy_BSV, d_BSV, r_BSV)
        mask_BS = torch.zeros_like(kl_BS)
        mask_BS[:, self.problem.prompt - 1 : -1] = 1  # the positions that predict a response's tokens
        by_sequence_B = (BETA0 / alpha_BS * kl_BS * mask_BS).sum(-1) / mask_BS.sum(-1)
        return by_sequence_B.sum() / self.problem.rows


class Ours(Side):
    """This package's trainer on one process, as ``aligndistil`` assembles it, fed from memory."""

    def __init__(self, problem: StepProblem, rank: int = 0) -> None:
        from megatron_aligndistil.algorithms.table import ALGORITHMS
        from megatron_aligndistil.checkpoint.locate import read_architecture
        from megatron_aligndistil.checkpoint.weights import load_weights
        from megatron_aligndistil.models.frozen import FrozenModel
        from megatron_aligndistil.models.policy import ModelSettings, Recompute, build_chunks, transformer_engine_usable
        from megatron_aligndistil.parallel import setup
        from megatron_aligndistil.trainer.loop import LoopSettings, Trainer
        from megatron_aligndistil.trainer.objective import POLICY, Learner, Objective
        from megatron_aligndistil.trainer.optimizer import prepare

        layout = setup.Layout()
        self.device = setup.initialize(layout, seed=0)
        config = _config(problem)
        settings = ModelSettings(
            layout=layout,
            dtype=torch.bfloat16 if problem.bf16 else torch.float32,
            max_sequence_length=problem.length,
            vocab_divisible_by=config.model.make_vocab_size_divisible_by,
            transformer_engine=transformer_engine_usable(),
            recompute=Recompute("full", "uniform", 1) if problem.recompute != "none" else Recompute(),
        )

        def model(path: str) -> list[Any]:
            chunks = build_chunks(read_architecture(path), settings)
            load_weights(chunks, path)
            return chunks

        algorithm = ALGORITHMS[config.algorithm](config)
        chunks = model(problem.models[0])
        frozen = {name: FrozenModel(model(role.path), offload=False) for name, role in algorithm.roles.items()}
        trained = prepare(chunks, config.model.optim, config.trainer.gradient_clip_val, total_steps=1)
        self.trainer = Trainer(
            [Learner(POLICY, trained, Objective(algorithm, chunks, frozen))],
            OneBatch(problem, chunks[0].architecture.vocab_size),
            LoopSettings(1, 0, False, False, Path()),
            hooks=[],
        )

    def step(self) -> float:
        return self.trainer.train_step()["loss"]


class OneBatch:
    """The same global batch in every step."""

    steps_per_epoch = 1
    has_validation = False
    metrics: Mapping[str, float] = {}

    def __init__(self, problem: StepProblem, vocab_size: int) -> None:
        from megatron_aligndistil.data.collate import MicroBatching, micro_batches
        from megatron_aligndistil.types import Example, Sequence

        rows = enumerate(problem.tokens(vocab_size))
        examples = [Example(f"row:{i}", (Sequence(tokens, problem.prompt),)) for i, tokens in rows]
        self.batches = micro_batches(examples, 0, 1, MicroBatching("bucketed", problem.micro_batch, problem.length))

    def step(self, step: int) -> list[Any]:
        """The micro-batches."""
        return self.batches

    def validation(self, step: int) -> Iterator[list[Any]]:
        """None."""
        return iter(())


def _config(problem: StepProblem) -> Any:
    from megatron_aligndistil.config import base_schema, schema

    policy, dpo, reverse_dpo = problem.models
    return schema.AlignDistilRunConfig(
        algorithm="aligndistil",
        trainer=base_schema.TrainerConfig(precision="bf16-mixed" if problem.bf16 else "32", gradient_clip_val=CLIP),
        model=schema.AlignDistilModelConfig(
            restore_from_path=policy,
            micro_batch_size=problem.micro_batch,
            global_batch_size=problem.rows,
            encoder_seq_length=problem.length,
            optim=base_schema.OptimConfig(
                lr=LEARNING_RATE, betas=list(BETAS), eps=ADAM_EPS, sched=base_schema.SchedConfig(name="WarmupPolicy")
            ),
            aligndistil=schema.AlignDistilConfig(
                alpha=ALPHA, epsilon=EPSILON, beta0=BETA0, dpo_path=dpo, reverse_dpo_path=reverse_dpo
            ),
        ),
    )


SIDES: dict[str, type[Side]] = {"ours": Ours, "plain": Plain}
