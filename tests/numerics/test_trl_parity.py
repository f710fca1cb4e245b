"""Loss, gradient and rewards of TRL's own trainers, on the same model and the same batch of unequal lengths."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_aligndistil.certificate.algorithm_check import AlgorithmCheck
from megatron_aligndistil.certificate.models import World
from megatron_aligndistil.certificate.sharded import Answer, Case, ShardedWorld
from megatron_aligndistil.checkpoint.locate import read_architecture
from megatron_aligndistil.config.base_schema import KernelConfig
from megatron_aligndistil.models.architecture import Architecture
from megatron_aligndistil.parallel import setup
from megatron_aligndistil.types import Example, Sequence
from tests.distributed.harness import run_ranks
from tests.tiny_models import save_tiny, tiny_model

TOLERANCE = 1e-5
VARIANT = "llama-odd-vocab"
PAD = 0
BETA, SMOOTHING = 0.3, 0.1
# (prompt, chosen, rejected) lengths: no two sequences of a batch are of one length.
LENGTHS = [(3, 9, 4), (7, 2, 8), (1, 5, 12), (5, 13, 1)]


@dataclass(frozen=True)
class Step:
    """What a step comes to: its loss, ∂loss/∂weight by Hugging Face name, and metrics under our names."""

    loss: float
    gradients: dict[str, torch.Tensor]
    metrics: dict[str, float]


@dataclass(frozen=True)
class Method:
    """One of our algorithms under settings of it, and the step of TRL's that should be the same."""

    algorithm: str
    settings: dict[str, Any]
    trl: Callable[[Path], Step]


def pairs(world: World | None = None) -> list[Example]:
    """Random tokens of the vocabulary but its padding."""
    rng = np.random.default_rng(3)

    def sequence(prompt: np.ndarray, response: int) -> Sequence:
        tokens = np.concatenate([prompt, rng.integers(1, 131, response)])
        return Sequence(tokens.astype(np.int32), len(prompt))

    made = []
    for i, (prompt, *responses) in enumerate(LENGTHS):
        asked = rng.integers(1, 131, prompt)
        made.append(Example(f"{i}", tuple(sequence(asked, length) for length in responses)))
    return made


# Both sides' models.


def policy() -> Any:
    """A tiny transformers model."""
    return tiny_model(VARIANT)


def reference() -> Any:
    """The same, trained a little."""
    model = tiny_model(VARIANT)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.1 * float(parameter.std())
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


# Our side.


def answers(methods: list[tuple[str, dict[str, Any]]], architecture: Architecture, weights: Any) -> list[Answer]:
    """One step of each algorithm on Megatron-Core, in micro-batches of one example; runs on a rank."""
    case = Case(dtype=torch.float32, tied=False)
    setup.initialize(case.layout, seed=1)
    sharded = ShardedWorld(World(architecture, _weights=weights), case)

    def unused(*_: Any) -> Any:
        raise AssertionError("TRL is the reference")

    checks = [AlgorithmCheck(name, 0, unused, examples=pairs, settings=settings) for name, settings in methods]
    return [sharded.step(check, KernelConfig()) for check in checks]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    """Every method's answer."""
    architecture = read_architecture(save_tiny(tmp_path_factory.mktemp("model"), VARIANT))
    weights = {"policy": dict(policy().state_dict()), "initial": dict(reference().state_dict())}
    given = [(method.algorithm, method.settings) for method in METHODS.values()]
    return dict(zip(METHODS, run_ranks(1, answers, given, architecture, weights)[0], strict=True))


# TRL's side.


@functools.cache
def tokenizer() -> Any:
    """One word a token: a trainer can't be built without one."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(WordLevel({f"t{i}": i for i in range(131)}, unk_token="t0"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=f"t{PAD}", eos_token="t1", bos_token="t2")


def arguments(folder: Path) -> dict[str, Any]:
    """What every trainer here is built with."""
    return {
        "output_dir": str(folder),
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": None,
    }


def text_rows() -> Any:
    """A data set that a trainer can be built with; the steps are of ``pairs``."""
    from datasets import Dataset

    return Dataset.from_list([{"prompt": "t5 t6", "chosen": " t7 t8", "rejected": " t9"}])


def split(example: Example) -> dict[str, list[int]]:
    """The prompt's, the chosen and the rejected response's tokens."""
    chosen, rejected = example.sequences
    start = chosen.prompt_length
    return {
        "prompt_ids": chosen.tokens[:start].tolist(),
        "chosen_ids": chosen.tokens[start:].tolist(),
        "rejected_ids": rejected.tokens[start:].tolist(),
    }


def dpo_trainer_step(folder: Path, batch_size: int = len(LENGTHS), **settings: Any) -> Step:
    """The mean over batches of DPOTrainer's loss."""
    from trl import DPOConfig, DPOTrainer

    model = policy()
    args = DPOConfig(**arguments(folder), beta=BETA, **settings)
    trainer = DPOTrainer(model, reference(), args=args, train_dataset=text_rows(), processing_class=tokenizer())
    rows = [split(example) for example in pairs()]
    batches = [trainer.data_collator(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    losses = [trainer.compute_loss(model, batch) for batch in batches]
    return step_of(model, torch.stack(losses).mean(), trainer._metrics["eval"])


def cpo_trainer_step(folder: Path, **settings: Any) -> Step:
    """CPOTrainer's loss, without its cross-entropy of chosen responses."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    model = policy()
    args = CPOConfig(**arguments(folder), cpo_alpha=0.0, **settings)
    trainer = CPOTrainer(model, args=args, train_dataset=text_rows(), processing_class=tokenizer())
    rows = []
    for example in pairs():
        row: dict[str, list[int]] = {}
        for name, sequence in zip(("chosen", "rejected"), example.sequences, strict=True):
            tokens, start = sequence.tokens.tolist(), sequence.prompt_length
            row[f"{name}_input_ids"], row[f"{name}_attention_mask"] = tokens, [1] * len(tokens)
            row[f"{name}_labels"] = [-100] * start + tokens[start:]
        rows.append(row)
    loss, metrics = trainer.get_batch_loss_metrics(model, trainer.data_collator(rows))
    return step_of(model, loss, {name: [value] for name, value in metrics.items()})


def step_of(model: Any, loss: torch.Tensor, reported: dict[str, list[float]]) -> Step:
    """A TRL step, its metrics averaged over batches and named as ours."""
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    names = {"chosen": "chosen_reward", "rejected": "rejected_reward", "margins": "reward_margin"}
    names["accuracies"] = "reward_accuracy"
    metrics = {own: float(np.mean(reported[f"rewards/{name}"])) for name, own in names.items()}
    return Step(float(loss.detach()), gradients, metrics)


AGAINST_INITIAL = {"dpo.beta": BETA, "dpo.reference_path": "initial"}
METHODS = {
    "dpo": Method("dpo", AGAINST_INITIAL, functools.partial(dpo_trainer_step, loss_type=["sigmoid"])),
    # TRL smooths the labels of "sigmoid" no more. "aot" does; it sorts the log-ratios of a batch first, and has nothing
    # to sort in a batch of one pair. ("robust" is another loss: cDPO's made unbiased.)
    "cdpo": Method(
        "cdpo",
        AGAINST_INITIAL | {"dpo.label_smoothing": SMOOTHING},
        functools.partial(dpo_trainer_step, batch_size=1, loss_type=["aot"], label_smoothing=SMOOTHING),
    ),
    "ipo": Method(
        "ipo",
        {"ipo.beta": BETA, "ipo.reference_path": "initial", "ipo.normalize_by_length": True},
        functools.partial(dpo_trainer_step, loss_type=["ipo"]),
    ),
    "simpo": Method(
        "simpo",
        {"simpo.beta": 2.5, "simpo.gamma": 1.4},
        functools.partial(cpo_trainer_step, loss_type="simpo", beta=2.5, simpo_gamma=1.4),
    ),
}
# TRL reports β times the log-ratio of a whole response for IPO too, whose loss is of the mean a token.
OTHER_REWARDS = {"ipo"}


@pytest.mark.parametrize("name", METHODS)
def test_loss_gradient_and_rewards_are_trls(name: str, ours: dict[str, Answer], tmp_path: Path) -> None:
    own, theirs = ours[name], METHODS[name].trl(tmp_path)
    assert own.gradients.keys() == theirs.gradients.keys()
    sizes = {key: float(gradient.norm()) for key, gradient in theirs.gradients.items()}
    off = {key: float((own.gradients[key] - gradient).norm()) for key, gradient in theirs.gradients.items()}
    value = abs(own.metrics["loss"] - theirs.loss) / theirs.loss
    gradient = max(off[key] / sizes[key] for key in sizes)
    print(f"{name}: loss {theirs.loss:.4f}, value off by {value:.1e}, the gradient of a weight by up to {gradient:.1e}")
    assert min(sizes.values()) > 1e-4  # nothing is saturated
    assert value <= TOLERANCE
    assert gradient <= TOLERANCE
    if name not in OTHER_REWARDS:
        for metric, expected in theirs.metrics.items():
            assert own.metrics[metric] == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE), metric
