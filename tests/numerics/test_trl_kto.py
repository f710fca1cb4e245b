"""KTO against TRL's trainer: its own batch, mismatched pairs, loss and backward pass on transformers' model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.harness import run_ranks
from tests.integration.program import write_model
from tests.tiny_models import save_tiny, tiny_model

ROWS = [
    {"prompt": "red green", "completion": " blue stone river", "label": True},
    {"prompt": "moon", "completion": " star", "label": False},
    {"prompt": "wind rain sand", "completion": " leaf moon", "label": False},
    {"prompt": "star moon leaf", "completion": " cloud bird bird rain sand", "label": True},
    {"prompt": "sand", "completion": " stone stone wind moon", "label": True},
]
HOW = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7}
BOUND = 1e-5


@dataclass(frozen=True)
class Step:
    """A loss, the KL before it is cut at 0 (ours) or after (TRL's), and the gradient by Hugging Face name."""

    loss: float
    kl: float
    gradients: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models near each other, so that σ is nowhere flat."""
    folder = tmp_path_factory.mktemp("trl")
    one = save_tiny(folder, "qwen2")
    other, generator = tiny_model("qwen2"), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    other.save_pretrained(folder / "other")
    return {"one": one, "other": folder / "other", "tokenizer": write_model(folder / "tokenizer", seed=1)}


def of_trl(models: dict[str, Path], trained: str, reference: str, folder: Path) -> tuple[Step, dict[str, Any]]:
    """What ``KTOTrainer`` makes of the rows as one batch, and that batch."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import KTOConfig, KTOTrainer

    policy, frozen = (
        AutoModelForCausalLM.from_pretrained(models[n], dtype=torch.float32) for n in (trained, reference)
    )
    trainer = KTOTrainer(
        model=policy,
        ref_model=frozen,
        args=KTOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=len(ROWS),
            train_sampling_strategy="sequential",
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            report_to=[],
            **HOW,
        ),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=AutoTokenizer.from_pretrained(models["tokenizer"]),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    policy.train()
    loss = trainer.compute_loss(policy, dict(batch))
    loss.backward()
    gradients = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    (kl,) = trainer._metrics["train"]["kl"]
    return Step(float(loss.detach()), kl, gradients), batch


def examples_of(batch: dict[str, Any], prefix: str = "") -> list[Any]:
    """The sequences of TRL's batch as ours, without its padding."""
    from megatron_aligndistil.types import Example, Sequence

    made = []
    for i, label in enumerate(batch["label"].tolist()):
        length = int(batch[f"{prefix}attention_mask"][i].sum())
        prompt = length - int(batch[f"{prefix}completion_mask"][i].sum())
        tokens = batch[f"{prefix}input_ids"][i, :length].numpy().astype(np.int32)
        made.append(Example(f"trl:{i}", (Sequence(tokens, prompt),), desirable=bool(label)))
    return made


def of_ours(trained: Path, reference: Path, examples: list[Any]) -> Step:
    """One step on a single rank, in micro-batches of two."""
    from dataclasses import replace

    from megatron_aligndistil.algorithms.kto import kto
    from megatron_aligndistil.checkpoint.locate import read_architecture
    from megatron_aligndistil.checkpoint.weights import load_weights
    from megatron_aligndistil.config.schema import KTORunConfig
    from megatron_aligndistil.data.collate import MicroBatching, micro_batches
    from megatron_aligndistil.models.frozen import FrozenModel
    from megatron_aligndistil.models.gathering import hf_tensors
    from megatron_aligndistil.models.policy import ModelSettings, build_chunks
    from megatron_aligndistil.parallel.setup import Layout, initialize
    from megatron_aligndistil.trainer.experience import Estimator, ExperiencePasses
    from megatron_aligndistil.trainer.objective import Objective
    from megatron_aligndistil.trainer.optimizer import wrap

    initialize(Layout(), seed=0, accelerator="cpu")

    def chunks_of(path: Path) -> Any:
        chunks = build_chunks(read_architecture(path), ModelSettings(Layout(), torch.float32, 64, 128, False))
        load_weights(chunks, path)
        return chunks

    config = KTORunConfig()
    config.model.restore_from_path = str(reference)
    for key, value in HOW.items():
        setattr(config.model.kto, key, value)
    algorithm, how = kto(config), MicroBatching("bucketed", 2, 64)
    chunks, frozen = chunks_of(trained), {"reference": FrozenModel(chunks_of(reference), offload=False)}
    wrapped = wrap(chunks, False)
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    assert algorithm.estimate is not None
    constants = Estimator(algorithm.estimate, ExperiencePasses(chunks, [], frozen, how)).constants(examples)
    batches = [replace(batch, constants=constants) for batch in micro_batches(examples, 0, 1, how)]
    objective = Objective(algorithm, chunks, frozen)
    losses = objective.gradients(wrapped, batches, objective.annotate(batches))
    total, count = sum(float(loss.total) for loss in losses), sum(loss.count for loss in losses)
    gradients = {name: tensor.clone() for name, tensor in hf_tensors(chunks, lambda p: p.main_grad)}
    return Step(total / count, constants["kl"], gradients)


@pytest.mark.parametrize(("trained", "reference"), [("one", "other"), ("other", "one")])
def test_value_and_gradient_are_trls(models: dict[str, Path], trained: str, reference: str, tmp_path: Path) -> None:
    from megatron_aligndistil.algorithms.kto import mismatched

    theirs, batch = of_trl(models, trained, reference, tmp_path)
    examples = examples_of(batch)
    for own, other in zip(mismatched(examples, 64), examples_of(batch, "KL_"), strict=True):
        assert own.sequences[0].tokens.tolist() == other.sequences[0].tokens.tolist()
        assert own.sequences[0].prompt_length == other.sequences[0].prompt_length

    ours = run_ranks(1, of_ours, models[trained], models[reference], examples)[0]
    assert ours.loss == pytest.approx(theirs.loss, rel=BOUND)
    assert max(ours.kl, 0.0) == pytest.approx(theirs.kl, rel=BOUND)
    assert abs(ours.kl) > 0.1
    assert ours.gradients.keys() == theirs.gradients.keys()
    errors = {
        name: float((ours.gradients[name] - gradient).norm() / gradient.norm())
        for name, gradient in theirs.gradients.items()
    }
    print(f"{trained}: KL {ours.kl:.3f}, loss off by {abs(ours.loss - theirs.loss):.1e}, {max(errors.values()):.1e}")
    assert max(errors.values()) <= BOUND
