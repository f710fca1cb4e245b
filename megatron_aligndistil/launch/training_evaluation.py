"""From a configuration to the evaluation of a run while it trains: prompts, engines, a reward, a judge.

Shapes: P prompts.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_aligndistil.algorithms.algorithm import Role
from megatron_aligndistil.algorithms.rewards import Reward, reward_of
from megatron_aligndistil.config.rollout_rules import rollout_of
from megatron_aligndistil.config.rollout_schema import RewardConfig, RolloutConfig
from megatron_aligndistil.config.schema import PPOModelConfig, RunConfig
from megatron_aligndistil.config.training_evaluation_schema import TrainingEvaluationConfig
from megatron_aligndistil.data.chat import stop_token_ids
from megatron_aligndistil.errors import RolloutError
from megatron_aligndistil.evaluation.content_cache import ContentCache
from megatron_aligndistil.evaluation.pairwise import PROMPT, Pair
from megatron_aligndistil.evaluation.passes import Listed, kept_of
from megatron_aligndistil.evaluation.win_rate import Comparison, WinRate, first_answers
from megatron_aligndistil.kernels.settings import MIB
from megatron_aligndistil.launch.analysis_answers import Asked, whole
from megatron_aligndistil.launch.analysis_bench import NUMBERS_WINDOW, Bench, Named, check_tokenizers
from megatron_aligndistil.launch.evaluate import judge_of
from megatron_aligndistil.launch.evaluate_pairwise import MAX_TOKENS, judge_prompt
from megatron_aligndistil.launch.evaluation_answers import VLLM_WINDOW
from megatron_aligndistil.launch.rollouts import RUNS_REWARD, RUNS_ROLLOUT, engine_of, keys_under
from megatron_aligndistil.models.frozen import FrozenModel
from megatron_aligndistil.models.policy import HiddenStateModel
from megatron_aligndistil.parallel import collectives, groups, heartbeat
from megatron_aligndistil.parallel.waiting import made_by_first_rank
from megatron_aligndistil.rollout.engine import Request, Sampling, seed_of
from megatron_aligndistil.rollout.engine_group import EngineGroup, Stream
from megatron_aligndistil.trainer.evaluation import Evaluated, EvaluationHook, answers_file
from megatron_aligndistil.trainer.rollout_source import RolloutSource
from megatron_aligndistil.trainer.source import BatchSource
from megatron_aligndistil.types import Example, Sample

logger = logging.getLogger(__name__)

FOLDER = "evaluation"  # in the log folder
OWN_REWARD, OWN_SAMPLING = "evaluation.reward", "evaluation.sampling"

Interrupted = Callable[[], bool]


@dataclass(frozen=True)
class Measures:
    """What answers are measured by; the comparison's judge is asked on rank 0 only."""

    reward: Reward | None
    comparison: Comparison | None

    @property
    def roles(self) -> dict[str, Role]:
        """The reward's frozen models, under names and keys that are no algorithm's."""
        roles = {} if self.reward is None else self.reward.roles
        return {f"{FOLDER}_{name}": replace(role, config_key=_own_key(role.config_key)) for name, role in roles.items()}


def measures(config: RunConfig, log_dir: Path) -> Measures | None:
    """What ``evaluation`` asks for, before a model is loaded; None where it asks for nothing.

    Raises:
        UserError: the judge cannot be reached, its prompt cannot be read, there is no such reward function, or a
            reward model has another tokenizer.
    """
    own, model = config.evaluation, config.model
    if not own.every_n_steps:
        return None
    reward = None
    if own.reward.source is not None:
        wanted = RewardConfig(**vars(own.reward))
        with keys_under(OWN_REWARD, RUNS_REWARD):
            reward = reward_of(
                PPOModelConfig(restore_from_path=model.restore_from_path, kernel=model.kernel, reward=wanted)
            )
    found = Measures(reward, _comparison(own, log_dir / FOLDER))
    named = [Named(role.config_key, role.path, role.scalar) for role in found.roles.values()]
    check_tokenizers([Named("model.restore_from_path", model.restore_from_path), *named])
    if found.comparison is not None:
        found.comparison.judge.check()  # by every rank: where one alone came to an end, the others would wait for it
        if own.cache_dir is not None:
            found.comparison.judge.cache.check()
    return found


def _own_key(text: str) -> str:
    return text.replace(RUNS_REWARD, OWN_REWARD)


def _comparison(own: TrainingEvaluationConfig, folder: Path) -> Comparison | None:
    cache = ContentCache(folder if own.cache_dir is None else Path(own.cache_dir).expanduser())
    judge = judge_of(own.judge, cache, "evaluation.judge")
    if judge is None:
        return None
    prompt = judge_prompt(own.judge_prompt, PROMPT, "evaluation.judge_prompt")
    return Comparison(judge, prompt, own.judge.max_tokens or MAX_TOKENS)


@dataclass(frozen=True)
class Trained:
    """What takes part of the run; ``frozen`` holds the measures' roles too."""

    bench: Bench
    chunks: Sequence[HiddenStateModel]
    frozen: Mapping[str, FrozenModel]
    source: BatchSource
    log_dir: Path


def evaluation_hook(measured: Measures, trained: Trained) -> EvaluationHook:
    """The hook, its prompts read.

    Raises:
        UserError: the prompts cannot be read.
    """
    own = trained.bench.run.evaluation
    evaluator = PolicyEvaluation(measured, trained)
    return EvaluationHook(evaluator, own.every_n_steps or 0, own.before_training, trained.log_dir / FOLDER)


class PolicyEvaluation:
    """Answers by the engine of the run's rollouts, or by one of its own, and what reward and judge make of them."""

    def __init__(self, measured: Measures, trained: Trained) -> None:
        bench, self.measured, self.trained = trained.bench, measured, trained
        self.config, self.own = bench.run, bench.run.evaluation
        self.rollouts = trained.source if isinstance(trained.source, RolloutSource) else None
        settings = rollout_of(self.config) or self.own.sampling
        self._window = VLLM_WINDOW if settings.engine == "vllm" else settings.hf_batch_size * groups.world().size
        seed, sampling = self.config.model.seed, self.own.sampling
        self.asked = Asked.of(bench, self.own.prompts, self.own.limit, seed)
        self.requests = [
            Request(example.sequences[0].tokens, seed_of(seed, FOLDER, place))
            for place, example in enumerate(self.asked.examples)
        ]
        self.tokenizer = bench.tokenizer()
        stops = tuple(stop_token_ids(self.tokenizer))
        how = sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.top_k
        self.sampling = Sampling(*how, stops)
        self._engines: EngineGroup | None = None
        self._baseline: Sequence[str] | None = None  # what the policy answered before training

    def start(self, step: int) -> None:
        """Start the engine, where there is none yet; a resumed run's judge goes on with the answers of its start.

        Raises:
            DataError: there are none to these prompts.
            RolloutError: the engine doesn't start.
        """
        if self.measured.comparison is not None and step and groups.world().rank == 0:
            self._baseline = first_answers(answers_file(self.trained.log_dir / FOLDER, 0), self.asked.texts)
        if self.rollouts is not None:
            self._engines = self.rollouts.engines
            return
        chunks, sampling = self.trained.chunks, self.own.sampling
        with keys_under(OWN_SAMPLING, RUNS_ROLLOUT):
            engine, dtype = engine_of(self.config, RolloutConfig(**vars(sampling)), chunks[0], self.trained.log_dir)
            self._engines = EngineGroup(engine, chunks, Stream(dtype, sampling.sync_bucket_mib * MIB))
            self._engines.sleep()

    def close(self) -> None:
        """End the engine that was started here."""
        if self._engines is not None and self.rollouts is None:
            self._engines.close()

    def evaluate(self, step: int, interrupted: Interrupted) -> Evaluated | None:
        """The policy's answers and their figures; every rank calls it.

        Raises:
            RolloutError: the engine was lost too often, or before training the reward function fails.
        """
        start = time.perf_counter()
        with keys_under(OWN_SAMPLING if self.rollouts is None else RUNS_ROLLOUT, RUNS_ROLLOUT):
            samples = self._answers(interrupted)
        if samples is None:
            return None
        texts = [str(self.tokenizer.decode(own.tokens.tolist(), skip_special_tokens=True)).strip() for own in samples]
        lengths_P = np.array([len(sample.tokens) for sample in samples])
        ended_P = np.array([sample.finish_reason == "stop" for sample in samples])
        metrics = {
            "answers": float(len(samples)),
            "response_tokens_mean": float(lengths_P.mean()),
            "ended_share": float(ended_P.mean()),
        }
        rows: list[dict[str, Any]] = [
            {"prompt": prompt, "answer": text, "tokens": int(length), "ended": bool(ended)}
            for prompt, text, length, ended in zip(self.asked.texts, texts, lengths_P, ended_P, strict=True)
        ]
        if self.measured.reward is not None:
            metrics |= self._rewarded(samples, rows, step)
        if not step:
            self._baseline = texts
        elif self.measured.comparison is not None:
            found = self._win_rate(self.measured.comparison, texts, interrupted)
            if found is None:
                return None
            metrics |= found.metrics
            for row, more in zip(rows, found.rows, strict=False):
                row.update(more)
        metrics["evaluation_seconds"] = time.perf_counter() - start
        return Evaluated(collectives.from_first_rank(metrics), rows)

    def _win_rate(self, comparison: Comparison, texts: Sequence[str], interrupted: Interrupted) -> WinRate | None:
        def asked(stop: threading.Event) -> WinRate | None:
            assert self._baseline is not None
            pairs = [Pair(*own) for own in zip(self.asked.texts, texts, self._baseline, strict=True)]
            return comparison.win_rate(pairs, stop)

        return made_by_first_rank(asked, "evaluation/judge", interrupted)

    def _answers(self, interrupted: Interrupted) -> list[Sample] | None:
        engines = self._engines
        assert engines is not None
        samples: list[Sample] = []
        stopped = False
        heartbeat.beat("evaluation/sync")
        engines.wake()
        engines.sync()
        for start in range(0, len(self.requests), self._window):
            if stopped := interrupted():
                break
            heartbeat.beat("evaluation/answers")
            samples += engines.generate(self.requests[start : start + self._window], self.sampling)
        engines.sleep()
        if self.rollouts is not None:
            self.rollouts.engines_were_used()
        return None if stopped else samples

    def _rewarded(self, samples: Sequence[Sample], rows: Sequence[dict[str, Any]], step: int) -> dict[str, float]:
        """Mean and spread, over answers that aren't empty; each reward goes into its row."""
        places = [i for i, sample in enumerate(samples) if len(sample.tokens)]
        examples = [Example(str(i), (whole(self.requests[i], samples[i]),)) for i in places]
        heartbeat.beat("evaluation/reward")
        rewards = self._rewards(examples, step)
        if rewards is None:
            return {"reward_failures": 1.0}
        for place, reward in zip(places, rewards, strict=True):
            rows[place]["reward"] = float(reward)
        failures = {"reward_failures": 0.0}
        return failures | ({"reward_mean": float(rewards.mean()), "reward_std": float(rewards.std())} if places else {})

    def _rewards(self, examples: Sequence[Example], step: int) -> np.ndarray | None:
        """The rewards; None where the reward function fails."""
        reward = self.measured.reward
        assert reward is not None
        statistics: list[dict[str, np.ndarray]] = [{} for _ in examples]
        passes = self.trained.bench.passes(NUMBERS_WINDOW)
        for name, role in reward.roles.items():
            frozen = {name: self.trained.frozen[f"{FOLDER}_{name}"]}
            for own, kept in zip(
                statistics, passes.run(frozen, role.keep, kept_of(name), Listed(examples)), strict=True
            ):
                own.update(kept)
        if reward.function is not None:
            scores = collectives.from_first_rank(
                self._of_function(examples, step) if groups.world().rank == 0 else None
            )
            if scores is None:
                return None
            statistics = [{"score": scores[i : i + 1]} for i in range(len(examples))]
        return np.array([reward.score(own) for own in statistics], np.float64)

    def _of_function(self, examples: Sequence[Example], step: int) -> np.ndarray | None:
        assert self.measured.reward is not None and self.measured.reward.function is not None
        decode = self.tokenizer.decode
        sequences = [example.sequences[0] for example in examples]
        prompts = [str(decode(own.tokens[: own.prompt_length].tolist())) for own in sequences]
        texts = [str(decode(own.tokens[own.prompt_length :].tolist(), skip_special_tokens=True)) for own in sequences]
        places = [f"evaluation.prompts, place {int(example.origin) + 1}" for example in examples]
        try:
            return self.measured.reward.function.scores(prompts, texts, places)
        except RolloutError as error:
            if not step:
                raise RolloutError(_own_key(str(error))) from error
            logger.warning("evaluation at step %d: no rewards: %s", step, _own_key(str(error)))
            return None
