"""Answers of several sharded models to the same prompts, and what a reward says of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_aligndistil.algorithms.rewards import Reward, reward_of
from megatron_aligndistil.algorithms.statistics import hidden_states
from megatron_aligndistil.config.analysis_schema import AnswerRewardConfig, SamplingConfig
from megatron_aligndistil.config.rollout_schema import RewardConfig, RolloutConfig
from megatron_aligndistil.config.schema import PPOModelConfig
from megatron_aligndistil.data.chat import stop_token_ids
from megatron_aligndistil.data.records import read_records
from megatron_aligndistil.evaluation.answers import Answers
from megatron_aligndistil.evaluation.passes import Listed, kept_of
from megatron_aligndistil.kernels.settings import MIB
from megatron_aligndistil.launch.analysis_bench import NUMBERS_WINDOW, Bench, Named, sampled
from megatron_aligndistil.launch.rollouts import RUNS_REWARD, RUNS_ROLLOUT, engine_of, keys_under
from megatron_aligndistil.models.lora import active
from megatron_aligndistil.parallel import collectives, groups
from megatron_aligndistil.rollout.engine import Request, Sampling, seed_of
from megatron_aligndistil.rollout.engine_group import EngineGroup, Stream
from megatron_aligndistil.types import Example, Message, Sample
from megatron_aligndistil.types import Sequence as TokenSequence

logger = logging.getLogger(__name__)

REWARD, SAMPLING = "analysis.reward", "analysis.sampling"


@dataclass(frozen=True)
class Asked:
    """The prompts as token ids, and as texts: the message, or of several each under its role."""

    examples: Sequence[Example]
    texts: Sequence[str]

    @classmethod
    def of(cls, bench: Bench, names: Sequence[str], limit: int, seed: int) -> Asked:
        """``limit`` prompts of the data sets ``names``, drawn with the seed."""
        loaded = bench.examples(names, "prompt")
        examples = loaded[sampled(len(loaded), limit, seed)]
        wanted = {example.origin for example in examples}
        texts = {
            record.origin: text_of(record.prompt)
            for name in names
            for record in read_records(name, "prompt")
            if record.origin in wanted
        }
        return cls(examples, [texts[example.origin] for example in examples])


@dataclass(frozen=True)
class Drawn:
    """A model's answers: what was sampled, the whole sequences, and the texts."""

    samples: Sequence[Sample]
    sequences: Sequence[Example]
    texts: Sequence[str]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each answer, its end token included."""
        return np.array([len(sample.tokens) for sample in self.samples], np.float64)


def text_of(prompt: Sequence[Message]) -> str:
    """A prompt for a reader: the message, or of several each under its role."""
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


@contextmanager
def engines_of(
    bench: Bench, named: Named, sampling: SamplingConfig, folder: Path, section: str = SAMPLING
) -> Iterator[EngineGroup]:
    """Every rank's engines with the sharded model's weights. A vLLM server starts from ``folder``.

    Messages name the keys under ``section``.

    Raises:
        RolloutError: the engine doesn't start.
    """
    model = bench.run.model
    # Weights are gathered from the device, where a model that waits in host memory isn't.
    here = replace(model, restore_from_path=named.path, frozen=replace(model.frozen, offload=False))
    own = Bench(replace(bench.run, model=here), bench.settings)
    frozen = own.model(named, hidden_states)
    with keys_under(section, RUNS_ROLLOUT):
        engine, dtype = engine_of(own.run, RolloutConfig(**vars(sampling)), frozen.chunks[0], folder)
        with closing(EngineGroup(engine, frozen.chunks, Stream(dtype, sampling.sync_bucket_mib * MIB))) as group:
            group.wake()
            with active(frozen.chunks, frozen.adapter):
                group.sync()
            yield group


def draw(bench: Bench, named: Named, asked: Sequence[Example], sampling: SamplingConfig, folder: Path) -> Drawn:
    """A model's answers to the prompts. The seeds are those of the prompts' places, the same for every model.

    Raises:
        RolloutError: the engine doesn't start, or a prompt leaves too few positions.
    """
    tokenizer = bench.tokenizer()
    requests = [
        Request(example.sequences[0].tokens, seed_of(bench.run.model.seed, "analysis", place))
        for place, example in enumerate(asked)
    ]
    how = Sampling(
        sampling.max_new_tokens,
        sampling.temperature,
        sampling.top_p,
        sampling.top_k,
        tuple(stop_token_ids(tokenizer)),
    )
    logger.info("%s: %d prompts", named.key, len(requests))
    with engines_of(bench, named, sampling, folder) as group:
        samples = group.generate(requests, how)
    sequences = [
        Example(f"{request.seed}", (whole(request, sample),)) for request, sample in zip(requests, samples, strict=True)
    ]
    texts = [str(tokenizer.decode(sample.tokens.tolist(), skip_special_tokens=True)).strip() for sample in samples]
    return Drawn(samples, sequences, texts)


def whole(request: Request, sample: Sample) -> TokenSequence:
    """Prompt and answer."""
    return TokenSequence(np.concatenate([request.prompt, sample.tokens]).astype(np.int32), len(request.prompt))


def reward_models(config: AnswerRewardConfig, baseline: str, section: str = REWARD) -> list[Named]:
    """The models that the reward takes; messages name its keys under ``section``."""
    if config.source is None:
        return []
    roles = _reward(config, PPOModelConfig(restore_from_path=baseline), section).roles
    return [Named(role.config_key.replace(RUNS_REWARD, section), role.path, role.scalar) for role in roles.values()]


def scores(
    bench: Bench, config: AnswerRewardConfig, answers: Mapping[str, Sequence[Example]], section: str = REWARD
) -> dict[str, np.ndarray]:
    """Model → the rewards of its answers [P], on every rank; empty where there is no reward.

    Raises:
        RolloutError: the reward function fails.
    """
    if config.source is None:
        return {}
    model = bench.run.model
    reward = _reward(config, PPOModelConfig(restore_from_path=model.restore_from_path, kernel=model.kernel), section)
    listed = Listed([example for own in answers.values() for example in own])
    statistics: list[dict[str, np.ndarray]] = [{} for _ in range(len(listed))]
    for name, role in reward.roles.items():
        named = Named(role.config_key.replace(RUNS_REWARD, section), role.path, role.scalar)
        frozen = bench.model(named, role.keep)
        found = bench.passes(NUMBERS_WINDOW).run({name: frozen}, role.keep, kept_of(name), listed)
        for own, kept in zip(statistics, found, strict=True):
            own.update(kept)
        del frozen
    if reward.function is not None:
        for own, score in zip(statistics, _of_texts(bench, reward, answers, section), strict=True):
            own["score"] = np.array([score])
    values = iter([reward.score(own) for own in statistics])
    return {name: np.array([next(values) for _ in own], np.float64) for name, own in answers.items()}


def _of_texts(bench: Bench, reward: Reward, answers: Mapping[str, Sequence[Example]], section: str) -> np.ndarray:
    """The reward function's scores of all answers, asked once on the first rank: it need not answer twice alike."""
    found = None
    if groups.world().rank == 0:
        tokenizer = bench.tokenizer()
        sequences = [example.sequences[0] for own in answers.values() for example in own]
        prompts = [str(tokenizer.decode(own.tokens[: own.prompt_length].tolist())) for own in sequences]
        texts = [
            str(tokenizer.decode(own.tokens[own.prompt_length :].tolist(), skip_special_tokens=True))
            for own in sequences
        ]
        places = [f"{name}, answer {i + 1}" for name, own in answers.items() for i in range(len(own))]
        assert reward.function is not None
        with keys_under(section, RUNS_REWARD):
            found = reward.function.scores(prompts, texts, places)
    found = collectives.from_first_rank(found)
    assert found is not None
    return found


def _reward(config: AnswerRewardConfig, model: PPOModelConfig, section: str) -> Reward:
    with keys_under(section, RUNS_REWARD):
        return reward_of(replace(model, reward=RewardConfig(**vars(config))))


def answers_of(drawn: Mapping[str, Drawn], scored: Mapping[str, np.ndarray]) -> dict[str, Answers]:
    """Lengths and rewards, for the comparison."""
    return {name: Answers(own.lengths, scored.get(name)) for name, own in drawn.items()}


def sampling_note(config: SamplingConfig, prompts: int, seed: int) -> str:
    """How the answers were drawn."""
    return (
        f"{prompts} prompts; answers by {config.engine}, temperature {config.temperature:g}, top-p {config.top_p:g}, "
        f"top-k {config.top_k}, at most {config.max_new_tokens} tokens, seed {seed}."
    )
