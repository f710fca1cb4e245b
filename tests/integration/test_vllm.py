"""The real vLLM, started as a run starts it, beside transformers with the same weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from megatron_aligndistil.config.rollout_schema import VLLMConfig
from megatron_aligndistil.errors import RolloutError
from megatron_aligndistil.rollout.engine import EngineLost, Request, Sampling
from megatron_aligndistil.rollout.vllm_engine import VLLMEngine
from megatron_aligndistil.types import Sample
from tests.integration.program import write_model

ROOT = Path(__file__).parents[2]
INTERPRETER = os.environ.get("ALIGNDISTIL_VLLM_PYTHON", str(ROOT / ".venv-vllm/bin/python"))
LIMIT = 128
LOGPROB_BOUND = 5e-5  # nats, float32 on both sides
GONE_SECONDS = 30

pytestmark = [
    pytest.mark.skipif(
        not Path(INTERPRETER).exists(),
        reason="no interpreter with vLLM: 'make vllm' builds one, or set ALIGNDISTIL_VLLM_PYTHON",
    ),
    pytest.mark.timeout(900),  # a start takes half a minute on idle cores
]

GREEDY = Sampling(max_new_tokens=24, temperature=0.0, top_p=1.0, top_k=0, stop_token_ids=(1,))
RANDOM = Sampling(max_new_tokens=24, temperature=1.0, top_p=1.0, top_k=0, stop_token_ids=(1,))
PROMPTS = [np.arange(3, 3 + length, dtype=np.int32) * 7 % 290 for length in (1, 4, 9, 17, 30, 2)]


def a_model(folder: Path) -> Path:
    """A random Llama with a tied head, as SmolLM2 has, whose distributions are far from flat."""
    from transformers import LlamaConfig, LlamaForCausalLM

    write_model(folder, seed=0)  # for its tokenizer
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=LIMIT,
        tie_word_embeddings=True,
        initializer_range=0.2,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def reference(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_model(tmp_path_factory.mktemp("vllm"))


def start(folder: Path, **settings: Any) -> VLLMEngine:
    given = VLLMConfig(**{"python": INTERPRETER, "dtype": "float32", "kv_cache_gib": 0.25, **settings})
    return VLLMEngine(given, folder, LIMIT, folder / "log", generates=True)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[VLLMEngine]:
    began = time.monotonic()
    # One long prompt a pass.
    started = start(folder, max_restarts=1, extra_args=["--max-num-batched-tokens", str(LIMIT)])
    print(f"vLLM was ready after {time.monotonic() - began:.1f} s")
    yield started
    started.close()


def requests(seed: int = 0) -> list[Request]:
    return [Request(prompt, seed=1000 * seed + i) for i, prompt in enumerate(PROMPTS)]


def tokens(samples: list[Sample]) -> list[list[int]]:
    return [sample.tokens.tolist() for sample in samples]


@torch.no_grad()
def expected_logprobs(model: Any, sequence: np.ndarray) -> np.ndarray:
    ids = torch.from_numpy(sequence.astype(np.int64))[None]
    found: np.ndarray = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0].numpy()
    return found


def assert_logprobs_are(engine: VLLMEngine, model: Any, sampling: Sampling = RANDOM) -> None:
    """Those of drawn tokens and those of given ones, beside the model's."""
    samples = engine.generate(requests(), sampling)
    sequences = [np.concatenate([prompt, sample.tokens]) for prompt, sample in zip(PROMPTS, samples, strict=True)]
    worst = 0.0
    for prompt, sample, sequence, scored in zip(PROMPTS, samples, sequences, engine.score(sequences), strict=True):
        expected = expected_logprobs(model, sequence)
        assert scored.shape == expected.shape
        worst = max(worst, np.abs(scored - expected).max())
        worst = max(worst, np.abs(sample.logprobs - expected[len(prompt) - 1 :]).max())
    print(f"largest difference of log-probs: {worst:.2e}")
    assert worst < LOGPROB_BOUND


def give(engine: VLLMEngine, weights: Mapping[str, torch.Tensor], buckets: int = 5) -> None:
    """All of the weights, in buckets that cut through layers."""
    engine.begin_update()
    names = [name for name in weights if name != "lm_head.weight"]
    size = -(-len(names) // buckets)
    for first in range(0, len(names), size):
        engine.load({name: weights[name].double() for name in names[first : first + size]})
    engine.end_update()


def test_long_prompts_are_drawn_after_with_their_seeds(engine: VLLMEngine) -> None:
    """More of them than a pass takes."""
    prompts = [np.arange(100, dtype=np.int32) * 7 % 280 + 3 + i for i in range(5)]
    asked = [Request(prompt, seed=i) for i, prompt in enumerate(prompts)]
    few = Sampling(max_new_tokens=4, temperature=1.0, top_p=1.0, top_k=0, stop_token_ids=(1,))
    together = engine.generate(asked, few)
    assert tokens(together) == [tokens(engine.generate([own], few))[0] for own in asked]


def moved(folder: Path, seed: int) -> Any:
    """The model with every parameter changed."""
    model = reference(folder)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def test_greedy_is_transformers_greedy(engine, folder):
    model = reference(folder)
    for prompt, sample in zip(PROMPTS, engine.generate(requests(), GREEDY), strict=True):
        ids = torch.from_numpy(prompt.astype(np.int64))[None]
        drawn = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=1)[0, len(prompt) :]
        assert sample.tokens.tolist() == drawn.tolist()


def test_same_seeds_give_the_same_samples(engine):
    first = engine.generate(requests(), RANDOM)
    assert tokens(engine.generate(requests(), RANDOM)) == tokens(first)
    alone = [engine.generate([request], RANDOM)[0] for request in reversed(requests())]
    assert tokens(alone[::-1]) == tokens(first)
    assert tokens(engine.generate(requests(seed=1), RANDOM)) != tokens(first)


def test_end_token_is_part_of_the_sample(engine):
    whole = engine.generate(requests(), RANDOM)
    assert {len(sample.tokens) for sample in whole if sample.finish_reason == "length"} == {24}
    stop = int(whole[3].tokens[5])
    cut = engine.generate(requests(), Sampling(24, 1.0, 1.0, 0, (stop,)))[3]
    place = whole[3].tokens.tolist().index(stop)
    assert cut.finish_reason == "stop"
    assert cut.tokens.tolist() == whole[3].tokens[: place + 1].tolist()
    assert cut.logprobs.shape == cut.tokens.shape


@pytest.mark.parametrize("sampling", [RANDOM, Sampling(24, 0.7, 0.8, 20, (1,))])
def test_logprobs_are_the_models_own(engine, folder, sampling):
    assert_logprobs_are(engine, reference(folder), sampling)


def test_room(engine):
    long = np.full(LIMIT - 3, 5, np.int32)
    sample = engine.generate([Request(long, 0)], Sampling(24, 1.0, 1.0, 0, ()))[0]
    assert len(sample.tokens) == 3 or sample.finish_reason == "stop"
    assert len(engine.score([np.full(LIMIT, 5, np.int32)])[0]) == LIMIT - 1
    with pytest.raises(RolloutError, match=f"a prompt of {LIMIT} tokens leaves no room"):
        engine.generate([Request(np.full(LIMIT, 5, np.int32), 0)], RANDOM)


def test_new_weights_again_and_again(engine, folder):
    for seed in (1, 2):
        model = moved(folder, seed)
        give(engine, model.state_dict())
        assert_logprobs_are(engine, model)
    engine.begin_update()
    engine.load({"model.norm.weight": torch.ones(64)})  # cut off
    give(engine, reference(folder).state_dict(), buckets=1)
    assert_logprobs_are(engine, reference(folder))
    assert not list(engine._server.folder.glob("*.safetensors"))


def test_weights_that_are_missing_or_wrong(engine, folder):
    weights = dict(reference(folder).state_dict())
    with pytest.raises(RolloutError, match=r"no weights for 1 parameters: model\.norm\.weight"):
        give(engine, {name: tensor for name, tensor in weights.items() if name != "model.norm.weight"})
    engine.begin_update()
    with pytest.raises(RolloutError, match="aligndistil_load failed"):
        engine.load({"model.norm.weight": torch.ones(65)})
    give(engine, weights)
    assert_logprobs_are(engine, reference(folder))


def test_the_same_server_by_its_url(engine, folder):
    far = start(folder, python=None, base_url=engine._server.url)
    assert tokens(far.generate(requests(), RANDOM)) == tokens(engine.generate(requests(), RANDOM))
    model = moved(folder, 3)
    give(far, model.state_dict())
    assert_logprobs_are(engine, model)
    give(far, reference(folder).state_dict())
    far.close()
    assert len(engine.generate(requests(), RANDOM)) == len(PROMPTS)
    with pytest.raises(RolloutError, match=f"its max_model_len is {LIMIT}, not {LIMIT + 1} or more"):
        VLLMEngine(VLLMConfig(base_url=engine._server.url), folder, LIMIT + 1, folder, generates=True)


def test_killed_while_it_generates(engine, folder):
    model = moved(folder, 4)
    give(engine, model.state_dict())
    expected = tokens(engine.generate(requests(), RANDOM))
    timer = threading.Timer(1.0, lambda: process_of(engine, "EngineCore").kill())
    timer.start()
    deadline = time.monotonic() + 60
    with pytest.raises(EngineLost):
        while time.monotonic() < deadline:
            engine.generate(requests(), Sampling(90, 1.0, 1.0, 0, ()))
    timer.join()
    engine.restart()
    give(engine, model.state_dict())
    assert tokens(engine.generate(requests(), RANDOM)) == expected
    with pytest.raises(RolloutError, match=r"max_restarts=1: vLLM was lost once more: .* see .*\.log"):
        engine.restart()


def test_closed_server_leaves_nothing(engine):
    keeper, handover = engine._server._keeper.pid, engine._server.folder
    started = psutil.Process(keeper).children(recursive=True)
    assert len(started) >= 2
    shared = {Path(place.path) for process in started for place in process.memory_maps() if "/dev/shm/" in place.path}
    engine.close()
    assert_gone(started)
    assert not handover.exists()
    assert not [path for path in shared if path.exists()]


def test_killed_trainer_leaves_no_server(folder):
    script = (
        "import sys, time; from pathlib import Path; from tests.integration.test_vllm import start;"
        "e = start(Path(sys.argv[1])); print(e._server._keeper.pid, e._server.folder, flush=True); time.sleep(600)"
    )
    trainer = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "ALIGNDISTIL_VLLM_PYTHON": INTERPRETER},
    )
    limit = threading.Timer(600, trainer.kill)
    limit.start()
    assert trainer.stdout is not None
    keeper, handover = trainer.stdout.readline().split()
    limit.cancel()
    started = [psutil.Process(int(keeper)), *psutil.Process(int(keeper)).children(recursive=True)]
    assert len(started) >= 3
    os.killpg(trainer.pid, signal.SIGKILL)
    trainer.communicate()
    assert_gone(started)
    assert not Path(handover).exists()


@pytest.mark.slow
def test_killed_keeper_leaves_no_server(folder):
    engine = start(folder)
    keeper = psutil.Process(engine._server._keeper.pid)
    started = keeper.children(recursive=True)
    keeper.kill()
    assert_gone(started)
    with pytest.raises(EngineLost):
        engine.generate(requests(), RANDOM)
    engine.close()
    assert not engine._server.folder.exists()


def test_server_that_does_not_start_says_why(folder):
    with pytest.raises(RolloutError) as caught:
        start(folder, extra_args=["--max-model-len", str(10 * LIMIT)])
    message = str(caught.value)
    assert "before it was ready" in message
    assert f"User-specified max_model_len ({10 * LIMIT}) is greater" in message
    assert "\n" not in message and "(log: " in message


def process_of(engine: VLLMEngine, title: str) -> psutil.Process:
    children = psutil.Process(engine._server._keeper.pid).children(recursive=True)
    return next(child for child in children if title in " ".join(child.cmdline()))


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=GONE_SECONDS)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
