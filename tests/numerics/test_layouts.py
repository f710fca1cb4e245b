"""Value and gradient of every algorithm equal a dense float64 reference, whatever the layout and the batching."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_aligndistil.parallel.setup import Layout
from megatron_aligndistil.types import Example
from tests.distributed.harness import run_ranks
from tests.numerics import dense_reference as dense
from tests.numerics.sharded import (
    Answer,
    Case,
    Job,
    losses_and_gradients,
    random_sequence,
    save_random_model,
)

VOCAB_SIZE = 83  # odd: a vocabulary shard is part padding
LAYERS = 4

CASES = [
    Case(micro_batch_size=4),
    Case(packed=True),
    Case(tensor=2, world=2),
    Case(tensor=2, world=2, sequence_parallel=True, micro_batch_size=2),
    Case(tensor=2, world=2, sequence_parallel=True, packed=True),
    Case(pipeline=2, world=2, micro_batch_size=2),
    Case(pipeline=2, world=2, packed=True),
    Case(pipeline=2, world=2, virtual_pipeline=2),
    Case(world=2, distributed_optimizer=True),
    Case(tensor=4, world=4),
    Case(tensor=4, world=4, sequence_parallel=True, micro_batch_size=4),
    Case(tensor=2, pipeline=2, world=4),
    Case(tensor=2, pipeline=2, world=4, sequence_parallel=True, packed=True),
    Case(tensor=2, world=4, micro_batch_size=2),
    Case(pipeline=2, world=4, packed=True),
    Case(tensor=2, world=2, recompute="full"),
    Case(micro_batch_size=2, recompute="selective"),
    Case(context=2, world=2, micro_batch_size=2),
    Case(context=2, tensor=2, world=4, sequence_parallel=True),
    Case(context=2, pipeline=2, world=4),
]
FP32_CASES = [
    Case(dtype="32", micro_batch_size=4),
    Case(dtype="32", tensor=2, pipeline=2, world=4, sequence_parallel=True),
    Case(dtype="32", tensor=4, world=4, packed=True),
    Case(dtype="32", pipeline=2, world=4, micro_batch_size=2),
]

DISTILL: dict[str, Any] = {"alpha": 3.0, "epsilon": 1e-2, "beta0": 0.1, "normalize_by_length": True}
MODES: dict[str, dict[str, Any]] = {
    "adaptive": {**DISTILL, "reward": "contrastive", "weight": "adaptive", "tvd_scale": 1.0},
    "authors": {
        **DISTILL,
        "reward": "contrastive",
        "weight": "adaptive",
        "tvd_scale": 2.0,
        "normalize_by_length": False,
    },
    "constant": {**DISTILL, "reward": "contrastive", "weight": "constant", "tvd_scale": 1.0},
    "vanilla": {**DISTILL, "reward": "vanilla", "weight": "adaptive", "tvd_scale": 1.0},
    "vanilla_constant": {**DISTILL, "reward": "vanilla", "weight": "constant", "tvd_scale": 1.0},
}


class World:
    """Random models on disk and a set of examples, with the reference's answers."""

    def __init__(self, folder: Path, tied: bool) -> None:
        from transformers import Qwen2Config

        config = Qwen2Config(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=LAYERS,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
        )
        self.shape = dense.Shape(LAYERS, 8, 4, 4, config.rms_norm_eps, 10000.0)
        self.path = {name: str(folder / name) for name in ("policy", "dpo", "reverse", "initial")}
        self.weights = {
            name: save_random_model(Path(path), config, seed, 0.25)
            for seed, (name, path) in enumerate(self.path.items())
        }
        rng = np.random.default_rng(7)
        self.singles = [Example(f"s:{i}", (random_sequence(rng, VOCAB_SIZE),)) for i in range(8)]
        self.pairs = [Example(f"p:{i}", tuple(random_sequence(rng, VOCAB_SIZE) for _ in range(2))) for i in range(8)]

    def job(self, name: str) -> Job:
        """``name``: sft, dpo, reverse_dpo or a mode of AlignDistil."""
        if name == "sft":
            return Job("sft", {}, self.path["policy"], self.singles)
        if name in ("dpo", "reverse_dpo"):
            section = {"beta": 0.3, "label_smoothing": 0.1, "reference_path": self.path["initial"]}
            return Job(name, section, self.path["policy"], self.pairs)
        paths: dict[str, Any] = {"dpo_path": self.path["dpo"], "initial_path": self.path["initial"]}
        if MODES[name]["reward"] == "contrastive":
            paths["reverse_dpo_path"] = self.path["reverse"]
        return Job("aligndistil", {**MODES[name], **paths}, self.path["policy"], self.singles)

    def reference(self, name: str) -> tuple[float, dense.Weights]:
        """The reference's loss and gradient."""
        weights = {k: v.clone().requires_grad_() for k, v in self.weights["policy"].items()}

        def responses(examples: list[Example]) -> list[tuple[dense.Response, ...]]:
            return [tuple(dense.Response(s.tokens, s.prompt_length) for s in e.sequences) for e in examples]

        singles, pairs = [r for (r,) in responses(self.singles)], responses(self.pairs)
        if name == "sft":
            loss = dense.sft(weights, self.shape, singles)
        elif name in ("dpo", "reverse_dpo"):
            ordered = [(c, r) if name == "dpo" else (r, c) for c, r in pairs]
            loss = dense.dpo(weights, self.weights["initial"], self.shape, ordered, beta=0.3, smoothing=0.1)
        else:
            how = dense.Distillation(**MODES[name])
            other = self.weights["reverse" if how.reward == "contrastive" else "initial"]
            loss = dense.aligndistil(weights, self.weights["dpo"], other, self.shape, singles, how)
        return float(loss), dense.gradients(loss, weights)


EVERY_LAYOUT = [(name, case) for case in CASES for name in ("sft", "dpo", "adaptive")]
EVERY_MODE = [
    (name, case)
    for case in (CASES[0], CASES[12])
    for name in ("reverse_dpo", "authors", "constant", "vanilla", "vanilla_constant")
]
IN_FLOAT32 = [(name, case) for case in FP32_CASES for name in ("sft", "dpo", "adaptive", "vanilla")]


class Answers:
    """The sharded answers, computed for all cases of a layout in one start of its ranks."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._by_layout: dict[tuple[int, Layout], dict[tuple[str, str], Answer]] = {}

    def of(self, name: str, case: Case) -> Answer:
        key = case.world, case.layout
        if key not in self._by_layout:
            work = [(n, c) for n, c in EVERY_LAYOUT + EVERY_MODE + IN_FLOAT32 if (c.world, c.layout) == key]
            jobs = [(self.world.job(name), case) for name, case in work]
            answers = run_ranks(case.world, losses_and_gradients, jobs, timeout_seconds=120)[0]
            self._by_layout[key] = {(n, str(c)): answer for (n, c), answer in zip(work, answers, strict=True)}
        return self._by_layout[key][name, str(case)]

    def relative_errors(self, name: str, case: Case) -> tuple[float, float]:
        """Relative error of the loss, and of the gradient in the 2-norm over all weights."""
        loss, gradient = self.world.reference(name)
        metrics, measured = self.of(name, case)
        assert set(measured) == set(gradient)
        distances = {k: float((measured[k].double() - gradient[k]).norm()) for k in gradient}
        error = math.hypot(*distances.values()) / math.hypot(*(float(g.norm()) for g in gradient.values()))
        # One small weight that is wrong must not hide behind the large ones.
        assert max(distances[k] / float(gradient[k].norm()) for k in gradient) < 100 * error + 1e-12
        value_error = abs(metrics["loss"] - loss) / abs(loss)
        print(f"{name} {case}: value {value_error:.1e}, gradient {error:.1e}")
        return value_error, error


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def answers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return Answers(World(tmp_path_factory.mktemp("models"), request.param))


def _ids(pair: tuple[str, Case]) -> str:
    return f"{pair[0]}-{pair[1]}"


@pytest.mark.parametrize("pair", EVERY_LAYOUT, ids=_ids)
def test_float64_matches_the_dense_reference_in_every_layout(answers: Answers, pair: tuple[str, Case]) -> None:
    value_error, gradient_error = answers.relative_errors(*pair)
    assert value_error <= 1e-10
    assert gradient_error <= 1e-10


@pytest.mark.parametrize("pair", EVERY_MODE, ids=_ids)
def test_float64_matches_the_dense_reference_in_every_mode(answers: Answers, pair: tuple[str, Case]) -> None:
    value_error, gradient_error = answers.relative_errors(*pair)
    assert value_error <= 1e-10
    assert gradient_error <= 1e-10


@pytest.mark.parametrize("pair", IN_FLOAT32, ids=_ids)
def test_float32_is_within_1e_5_of_the_dense_reference(answers: Answers, pair: tuple[str, Case]) -> None:
    value_error, gradient_error = answers.relative_errors(*pair)
    assert value_error <= 1e-5
    assert gradient_error <= 1e-5


def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(answers: Answers) -> None:
    job = answers.world.job("adaptive")
    # π_d = π_r leaves z* = z_d, so the student that is π_d as well is at the optimum.
    same = dict.fromkeys(("dpo_path", "reverse_dpo_path", "initial_path"), job.model)
    job = Job("aligndistil", {**job.section, **same}, job.model, job.examples)
    metrics, gradient = run_ranks(4, losses_and_gradients, [(job, Case(tensor=2, pipeline=2, world=4))])[0][0]
    assert abs(metrics["loss"]) <= 1e-12
    assert max(float(tensor.abs().max()) for tensor in gradient.values()) <= 1e-12
    assert metrics["beta_max"] == pytest.approx(0.1 / 1e-2)
