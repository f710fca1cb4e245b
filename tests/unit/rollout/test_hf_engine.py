"""The transformers engine: what tokens depend on, what they are drawn from, and the log-probs that come with them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_aligndistil.errors import RolloutError
from megatron_aligndistil.rollout import hf_engine
from megatron_aligndistil.rollout.engine import Request, Sampling, seed_of
from megatron_aligndistil.rollout.hf_engine import HFEngine
from tests.tiny_models import VARIANTS, save_tiny, tiny_config, tiny_model

CPU = torch.device("cpu")
PLAIN = Sampling(max_new_tokens=12, temperature=1.0, top_p=1.0, top_k=0, stop_token_ids=())
GREEDY = replace(PLAIN, temperature=0.0)
VARIANT = "qwen2-untied"


def give(engine, weights, buckets=1):
    names = list(weights)
    engine.begin_update()
    for first in range(buckets):
        engine.load({name: weights[name] for name in names[first::buckets]})
    engine.end_update()


def weights_of(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def filled(variant=VARIANT, batch_size=4, dtype=torch.float32):
    engine = HFEngine(tiny_config(variant), CPU, dtype, batch_size)
    give(engine, weights_of(tiny_model(variant)))
    return engine


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    # More of them cost tiny models minutes where other processes want the cores.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def engine():
    return filled()


@pytest.fixture(scope="module")
def dense():
    return tiny_model(VARIANT)


def prompts(n, seed=0, vocab=97):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, int(rng.integers(1, 20))).astype(np.int32) for _ in range(n)]


def requests(n, seed=0):
    return [Request(prompt, seed_of("test", seed, index)) for index, prompt in enumerate(prompts(n, seed))]


def dense_logprobs(model, prompt, tokens):
    """Log-probs of a response, from logits of the unpadded sequence."""
    sequence = torch.tensor(np.concatenate([prompt, tokens]).astype(np.int64))
    with torch.no_grad():
        logprobs = model(sequence[None]).logits[0].float().log_softmax(-1)
    first = len(prompt)
    return logprobs[first - 1 : -1].gather(1, sequence[first:, None])[:, 0].numpy()


def tokens_of(samples):
    return [sample.tokens.tolist() for sample in samples]


def test_tokens_depend_on_nothing_but_the_request(engine):
    asked = requests(9)
    expected = tokens_of(engine.generate(asked, PLAIN))
    assert len({tuple(tokens) for tokens in expected}) == len(expected)
    for batch_size in (1, 3, 16):
        assert tokens_of(filled(batch_size=batch_size).generate(asked, PLAIN)) == expected
    assert tokens_of(engine.generate(asked[::-1], PLAIN)) == expected[::-1]
    assert tokens_of(engine.generate(requests(4, seed=1) + asked[2:4], PLAIN))[4:] == expected[2:4]
    assert tokens_of(engine.generate(asked[5:6], replace(PLAIN, max_new_tokens=5)))[0] == expected[5][:5]


def test_other_seeds_give_other_tokens_and_torchs_generator_is_left_alone(engine):
    before = torch.get_rng_state()
    HFEngine(tiny_config(VARIANT), CPU, torch.float32, 4)
    drawn = engine.generate([Request(prompts(1)[0], seed) for seed in range(20)], PLAIN)
    assert len({tuple(tokens) for tokens in tokens_of(drawn)}) == 20
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_are_fixed_for_good():
    # A resumed run must draw what the ended one would have drawn.
    uniforms = hf_engine._uniforms([7, 2**63 - 1], replace(PLAIN, max_new_tokens=5), CPU)
    assert uniforms.dtype == torch.float64
    assert torch.equal(uniforms[:, :2], hf_engine._uniforms([7, 2**63 - 1], replace(PLAIN, max_new_tokens=2), CPU))
    assert (uniforms[0, :3] * 2**53).tolist() == [7854939372338495, 2660414844247240, 3783903496768853]
    assert uniforms[1].tolist() != uniforms[0].tolist()


def kept_distribution(logits, sampling):
    """The distribution that tokens must follow, written down without warpers."""
    p = np.exp((logits - logits.max()) / sampling.temperature)
    order = np.argsort(-p)
    if sampling.top_k:
        p[order[sampling.top_k :]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= sampling.top_p]] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 1.5, "top_p": 0.9},
        {"top_k": 5},
        {"temperature": 2.0, "top_p": 0.8, "top_k": 7},
    ],
    ids=str,
)
def test_first_tokens_follow_the_distribution(dense, change):
    n, prompt = 3000, np.array([5, 17, 2, 60], np.int32)
    sampling = replace(PLAIN, max_new_tokens=1, **change)
    drawn = filled(batch_size=1000).generate([Request(prompt, seed_of("chi", i)) for i in range(n)], sampling)
    counts = np.bincount([int(sample.tokens[0]) for sample in drawn], minlength=97)
    with torch.no_grad():
        logits = dense(torch.tensor(prompt[None].astype(np.int64))).logits[0, -1].double().numpy()
    expected = kept_distribution(logits, sampling)
    assert (expected > 0).sum() >= 3
    assert counts[expected == 0].sum() == 0
    rare = n * expected < 5
    observed, wanted = counts[~rare], n * expected[~rare]
    if expected[rare].sum():
        observed, wanted = np.append(observed, counts[rare].sum()), np.append(wanted, n * expected[rare].sum())
    chi_square = torch.tensor(((observed - wanted) ** 2 / wanted).sum(), dtype=torch.float64)
    degrees = torch.tensor(len(wanted) - 1, dtype=torch.float64)
    assert torch.special.gammaincc(degrees / 2, chi_square / 2) > 1e-3


def test_a_draw_never_hits_what_has_no_probability():
    scores = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]] * 3)
    uniforms = torch.tensor([[0.0], [0.5], [1 - 2.0**-53]], dtype=torch.float64)
    drawing = hf_engine._Drawing(PLAIN, uniforms)
    assert drawing(torch.zeros(3, 1), scores).argmax(-1).tolist() == [1, 3, 3]


def test_temperature_zero_is_transformers_greedy(engine, dense):
    asked = requests(5)
    for request, sample in zip(asked, engine.generate(asked, GREEDY), strict=True):
        ids = torch.tensor(request.prompt[None].astype(np.int64))
        own = dense.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert sample.tokens.tolist() == own[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("change", [{"temperature": 0.0}, {}, {"temperature": 0.7, "top_p": 0.9, "top_k": 20}], ids=str)
def test_logprobs_are_of_the_model_at_temperature_one(engine, dense, change):
    asked = requests(6)
    for request, sample in zip(asked, engine.generate(asked, replace(PLAIN, **change)), strict=True):
        assert (sample.tokens.dtype, sample.logprobs.dtype) == (np.int32, np.float32)
        np.testing.assert_allclose(sample.logprobs, dense_logprobs(dense, request.prompt, sample.tokens), atol=1e-5)


def test_stop_tokens_end_responses_and_are_included(engine):
    asked = requests(8)
    free = tokens_of(engine.generate(asked, PLAIN))
    stops = (free[0][3], free[1][6], free[2][-1])
    drawn = engine.generate(asked, replace(PLAIN, stop_token_ids=stops))
    for sample, tokens in zip(drawn, free, strict=True):
        ends = [place for place, token in enumerate(tokens) if token in stops]
        expected = tokens[: ends[0] + 1] if ends else tokens
        assert sample.tokens.tolist() == expected
        assert len(sample.logprobs) == len(expected)
        assert sample.finish_reason == ("stop" if ends else "length")
    assert {sample.finish_reason for sample in drawn} == {"stop", "length"}


def test_a_batch_ends_with_its_last_response(engine, monkeypatch):
    asked = requests(2)
    stops = tuple(tokens[2] for tokens in tokens_of(engine.generate(asked, PLAIN)))
    steps = []
    own = hf_engine._logprobs
    monkeypatch.setattr(hf_engine, "_logprobs", lambda *given: steps.append(1) or own(*given))
    engine.generate(asked, replace(PLAIN, max_new_tokens=100, stop_token_ids=stops))
    assert len(steps) <= 3


def test_the_configs_ideas_of_generation_do_not_apply(dense):
    config = tiny_config(VARIANT)
    config.eos_token_id = 3
    config.repetition_penalty = 50.0
    config.use_cache = False
    engine = HFEngine(config, CPU, torch.float32, 4)
    give(engine, weights_of(dense))
    assert tokens_of(engine.generate(requests(5), PLAIN)) == tokens_of(filled().generate(requests(5), PLAIN))


@pytest.mark.parametrize("chunk", [hf_engine.SCORED_LOGITS, 97 * 7])
def test_scores_are_dense_logprobs(engine, dense, chunk, monkeypatch):
    monkeypatch.setattr(hf_engine, "SCORED_LOGITS", chunk)
    sequences = [*prompts(9, seed=3), np.array([4], np.int32)]
    scores = engine.score(sequences)
    assert len(scores[-1]) == 0
    for sequence, score in zip(sequences, scores, strict=True):
        assert score.dtype == np.float32
        np.testing.assert_allclose(score, dense_logprobs(dense, sequence[:1], sequence[1:]), atol=1e-5)
    assert [len(score) for score in engine.score([np.array([4], np.int32)])] == [0]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_a_model_that_transformers_loads(tmp_path, variant, dtype):
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path, variant), dtype=dtype).eval()
    engine = HFEngine(loaded.config, CPU, dtype, 4)
    give(engine, weights_of(tiny_model(variant)), buckets=3)  # in float32: load casts
    tokens = torch.arange(2, 92).reshape(2, 45)
    with torch.no_grad():
        assert torch.equal(engine._model(tokens).logits, loaded(tokens).logits)
    assert not any(parameter.requires_grad for parameter in engine._model.parameters())


def test_new_weights_replace_old_ones(engine, dense):
    engine = filled()
    give(engine, {name: tensor * 0.5 for name, tensor in weights_of(dense).items()}, buckets=4)
    other = engine.generate(requests(2), PLAIN)
    give(engine, weights_of(dense), buckets=2)
    again = engine.generate(requests(2), PLAIN)
    assert tokens_of(again) == tokens_of(filled().generate(requests(2), PLAIN)) != tokens_of(other)


def test_an_update_that_is_not_whole_is_a_bug(dense):
    weights = weights_of(dense)
    engine = HFEngine(tiny_config(VARIANT), CPU, torch.float32, 4)
    with pytest.raises(RuntimeError, match="were not given"):
        engine.generate(requests(1), PLAIN)
    first = next(iter(weights))
    engine.begin_update()
    engine.load({name: tensor for name, tensor in weights.items() if name != first})
    with pytest.raises(RuntimeError, match=f"1 parameters were not given in the update: {first}"):
        engine.end_update()
    with pytest.raises(RuntimeError, match="shape"):
        engine.load({first: weights[first][:1]})
    engine.begin_update()
    engine.load({first: weights[first]})
    for name in (first, "model.extra.weight"):
        with pytest.raises(RuntimeError, match="given twice"):
            engine.load({name: weights[first]})


def test_too_long_a_prompt_is_one_line(engine):
    long = Request(np.zeros(117, np.int32), 0)
    with pytest.raises(RolloutError) as caught:
        engine.generate([*requests(1), long], PLAIN)
    line = str(caught.value)
    assert "\n" not in line
    for part in ("117", "model.rollout.max_new_tokens=12", "128", "model.data.max_prompt_length"):
        assert part in line
    assert len(engine.generate([replace(long, prompt=long.prompt[1:])], PLAIN)[0].tokens) == 12


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_one_line(dense, temperature):
    engine = filled()
    give(engine, {name: tensor * (torch.nan if "norm" in name else 1) for name, tensor in weights_of(dense).items()})
    with pytest.raises(RolloutError, match="not finite"):
        engine.generate(requests(2), replace(PLAIN, temperature=temperature))


def test_no_requests_no_answers_and_an_engine_that_ends():
    engine = filled()
    assert engine.generates
    assert engine.generate([], PLAIN) == [] == engine.score([])
    engine.sleep()
    engine.wake()
    assert len(engine.generate(requests(1), PLAIN)) == 1
    with pytest.raises(RuntimeError, match="never lost"):
        engine.restart()
    engine.close()


def test_bfloat16_draws():
    drawn = filled(dtype=torch.bfloat16).generate(requests(3), PLAIN)
    assert all(np.isfinite(sample.logprobs).all() and sample.logprobs.dtype == np.float32 for sample in drawn)


IN_TRAINING = """
from megatron_aligndistil.parallel import cpu
cpu.install()
from tests.unit.rollout.test_hf_engine import PLAIN, filled, requests, tokens_of
print(tokens_of(filled().generate(requests(3), PLAIN)))
"""


def test_the_cpu_runtime_of_training_changes_nothing(engine):
    command = [sys.executable, "-W", "ignore", "-c", IN_TRAINING]
    finished = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[-1] == str(tokens_of(engine.generate(requests(3), PLAIN)))
