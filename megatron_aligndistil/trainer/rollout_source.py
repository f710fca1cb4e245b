"""Micro-batches from the policy's own responses: the on-policy source."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_aligndistil.algorithms.algorithm import Experience, Keep, Passes, Trajectory
from megatron_aligndistil.data.collate import MicroBatching, micro_batches
from megatron_aligndistil.data.examples import ExampleSet
from megatron_aligndistil.data.sampler import BatchSampler, epoch_order, validation_batches
from megatron_aligndistil.errors import RolloutError
from megatron_aligndistil.parallel import collectives, groups
from megatron_aligndistil.rollout.engine import Request, seed_of
from megatron_aligndistil.rollout.engine_group import EngineGroup
from megatron_aligndistil.trainer.experience import ExperiencePasses, with_values
from megatron_aligndistil.trainer.metrics import PhaseClock
from megatron_aligndistil.trainer.rollout_plan import CurrentRollout, RolloutPlan
from megatron_aligndistil.trainer.source import SourceState
from megatron_aligndistil.types import Batch, Example, Sample
from megatron_aligndistil.types import Sequence as TokenSequence

logger = logging.getLogger(__name__)

_BYTES_PER_MIB = 1 << 20
VALIDATION = "validation"


@dataclass(frozen=True)
class Prompts:
    """What is asked in training and in validation, and token ids as text, with special tokens or without."""

    train: ExampleSet
    validation: ExampleSet | None
    limit_validation: int
    decode: Callable[[np.ndarray, bool], str]


@dataclass(frozen=True)
class Scoring:
    """The passes over a rollout, what they are for, and how engine and trainer are compared."""

    passes: ExperiencePasses
    experience: Experience
    logprobs: Keep


class RolloutSource:
    """Draws a rollout when a step needs the next one, has it scored once, and deals it out over its steps.

    Weights go to the engines before a rollout where the last ones are ``sync_every`` steps old; and after a checkpoint,
    since a run that is resumed there has none to go on with, or an evaluation.
    """

    def __init__(
        self, prompts: Prompts, plan: RolloutPlan, engines: EngineGroup, scoring: Scoring, batching: MicroBatching
    ) -> None:
        self.prompts, self.plan, self.engines, self.scoring, self.batching = prompts, plan, engines, scoring, batching
        self.sampler = BatchSampler(len(prompts.train), plan.sizes.prompts, plan.seed)
        self.steps_per_epoch = self.sampler.steps_per_epoch * plan.sizes.steps
        self.has_validation = prompts.validation is not None and prompts.limit_validation != 0
        self.metrics: Mapping[str, float] = {}
        self._current = CurrentRollout(state=dict(scoring.experience.state))
        self._engine_weights = -1  # optimizer steps done when the engines got theirs; -1: never, or not to be used
        self._synced_bytes = 0

    def step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of optimizer step ``step``."""
        sizes = self.plan.sizes
        phase, position = divmod(step, sizes.steps)
        metrics: Mapping[str, float] = {}
        if self._current.phase != phase:
            metrics = self._collect(phase, step)
        self.metrics = {**metrics, "rollout/off_policy_steps": float(step - self._current.weights_step)}
        epoch, part = divmod(position, sizes.steps_per_epoch)
        examples = self._current.examples
        order = epoch_order(len(examples), seed_of(self.plan.seed, "order", phase), epoch)
        return self._share([examples[i] for i in np.array_split(order, sizes.steps_per_epoch)[part]])

    def validation(self, step: int) -> Iterator[list[Batch]]:
        """Responses to the validation prompts, drawn with the same seeds each time, a global batch at a time."""
        if self.prompts.validation is None:
            return
        batches = validation_batches(self.prompts.validation, self.plan.sizes.train_batch)
        totals: dict[str, float] = {}
        count = 0
        for number, prompts in enumerate(batches):
            if number == self.prompts.limit_validation:
                break
            examples, metrics, _ = self._drawn(prompts, (VALIDATION, number), step)
            count += len(examples)
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + value * len(examples)
            self.metrics = {name: total / count for name, total in totals.items() if not name.endswith("_seconds")}
            yield self._share(examples)

    def state(self, step: int) -> SourceState:
        """The rollout, where step ``step`` still trains on it. The engines' weights are not used after this."""
        self._engine_weights = -1
        return self._current.saved(unfinished=step < (self._current.phase + 1) * self.plan.sizes.steps)

    def restore(self, state: SourceState) -> None:
        """Go on with the rollout that ``state`` returned."""
        self._current = CurrentRollout.restored(state)

    def engines_were_used(self) -> None:
        """Someone else gave the engines weights: the next rollout brings its own."""
        self._engine_weights, self._synced_bytes = -1, self.engines.synced_bytes

    def close(self) -> None:
        """End the engines."""
        self.engines.close()

    def _collect(self, phase: int, step: int) -> Mapping[str, float]:
        prompts = self.prompts.train[self.sampler.batch(phase)]
        examples, metrics, state = self._drawn(prompts, ("train", phase), step)
        needed = self.plan.sizes.steps_per_epoch * groups.data().size
        if len(examples) < needed:
            raise RolloutError(
                f"rollout {phase}: {len(examples)} of {self.plan.sizes.responses} responses are not empty, and its "
                f"steps on {groups.data().size} data-parallel ranks need {needed}; check the prompts and model.rollout"
            )
        self._current = CurrentRollout(phase, self._engine_weights, examples, state)
        return metrics

    def _drawn(
        self, prompts: Sequence[Example], number: tuple[str, int], step: int
    ) -> tuple[list[Example], dict[str, float], Mapping[str, float]]:
        """Examples with their values, metrics, and the assembly's state, of one rollout of ``prompts``."""
        clock = PhaseClock()
        metrics: dict[str, float] = {}
        requests, origins = self._requests(prompts, number)
        self.engines.wake()
        stale = self._engine_weights < 0 or step - self._engine_weights >= self.plan.sizes.sync_every
        if stale or (number[0] == VALIDATION and step != self._engine_weights):
            with clock.phase("rollout/sync"):
                self.engines.sync()
            self._engine_weights = step
            with clock.phase("rollout/probe"):
                metrics |= self._compared()
        with clock.phase("rollout/generate"):
            samples = self.engines.generate(requests, self.plan.sampling)
        self.engines.sleep()
        with clock.phase("rollout/score"):
            examples, kept = kept_examples(requests, samples, origins)
            if not examples:
                raise RolloutError(
                    f"{number[0]} rollout {number[1]}: all {len(samples)} responses are empty; check the prompts"
                )
            trajectories = self._trajectories(examples)
            assembled = self.scoring.experience.assemble(trajectories, self._current.state)
        metrics |= assembled.metrics
        metrics |= sample_metrics(samples, trajectories, kept)
        metrics |= clock.seconds
        metrics |= self._engine_metrics(samples, clock.seconds["rollout/generate_seconds"])
        return with_values(trajectories, assembled.values), metrics, assembled.state

    def _requests(self, prompts: Sequence[Example], number: tuple[str, int]) -> tuple[list[Request], list[str]]:
        samples = self.plan.sizes.samples if number[0] != VALIDATION else 1
        requests, origins = [], []
        for place, prompt in enumerate(prompts):
            for sample in range(samples):
                requests.append(Request(prompt.sequences[0].tokens, seed_of(self.plan.seed, *number, place, sample)))
                origins.append(f"{prompt.origin}, {number[0]} rollout {number[1]}, response {place}.{sample}")
        return requests, origins

    def _trajectories(self, examples: Sequence[Example]) -> list[Trajectory]:
        """With the statistics of every pass, and the reward function's score."""
        statistics = self.scoring.passes.statistics(examples, self.scoring.experience)
        function = self.scoring.experience.function
        if function is not None and examples:
            decode = self.prompts.decode
            texts = [
                (s.tokens[: s.prompt_length], s.tokens[s.prompt_length :]) for (s,) in (e.sequences for e in examples)
            ]
            scores = None
            if groups.world().rank == 0:  # asked once: it need not answer twice alike
                prompts, responses = ([decode(pair[i], i == 0) for pair in texts] for i in (0, 1))
                scores = function.scores(prompts, responses, [example.origin for example in examples])
            scores = collectives.from_first_rank(scores)
            assert scores is not None
            statistics = [{**own, "score": scores[i : i + 1]} for i, own in enumerate(statistics)]
        return [Trajectory(example, own) for example, own in zip(examples, statistics, strict=True)]

    def _compared(self) -> dict[str, float]:
        """How far the engines' log-probs of some prompts are from the trainer's.

        Raises:
            RolloutError: further than the configuration allows.
        """
        candidates = self.prompts.train[range(min(self.plan.probe_prompts, len(self.prompts.train)))]
        tokens = [sequence.tokens for (sequence,) in (e.sequences for e in candidates) if sequence.length > 1]
        if not tokens:
            return {}
        examples = [Example(f"probe {i}", (TokenSequence(ids, 1),)) for i, ids in enumerate(tokens)]
        trainer = self.scoring.passes.statistics(examples, Passes(policy={"logprob": self.scoring.logprobs}))
        engine = self.engines.score(tokens)
        gaps = np.abs(
            np.concatenate(engine).astype(np.float64)
            - np.concatenate([statistics["logprob"] for statistics in trainer])
        )
        mean, limit = float(gaps.mean()), self.plan.max_logprob_gap
        if not mean <= limit:
            raise RolloutError(
                f"model.rollout.max_logprob_gap={limit:g}: after new weights the engine's log-probs differ by "
                f"{mean:.3g} nats a token from the trainer's (at most {gaps.max():.3g}); the engine runs other "
                "weights, another model or a coarser type: check them, or raise the limit"
            )
        return {"rollout/logprob_gap": mean, "rollout/logprob_gap_max": float(gaps.max())}

    def _engine_metrics(self, samples: Sequence[Sample], seconds: float) -> dict[str, float]:
        before, self._synced_bytes = self._synced_bytes, self.engines.synced_bytes
        return {
            "rollout/sync_mib": (self._synced_bytes - before) / _BYTES_PER_MIB,
            "rollout/restarts": float(self.engines.restarts),
            "rollout/tokens_per_second": sum(len(sample.tokens) for sample in samples) / seconds,
        }

    def _share(self, examples: Sequence[Example]) -> list[Batch]:
        axis = groups.data()
        return micro_batches(examples, axis.rank, axis.size, self.batching)


def kept_examples(
    requests: Sequence[Request], samples: Sequence[Sample], origins: Sequence[str]
) -> tuple[list[Example], list[Sample]]:
    """Prompt and response of every sample that isn't empty, and those samples."""
    whole = [
        (Example(origin, (TokenSequence(np.concatenate([r.prompt, s.tokens]).astype(np.int32), len(r.prompt)),)), s)
        for r, s, origin in zip(requests, samples, origins, strict=True)
        if len(s.tokens)
    ]
    return [example for example, _ in whole], [sample for _, sample in whole]


def sample_metrics(
    samples: Sequence[Sample], trajectories: Sequence[Trajectory], kept: Sequence[Sample]
) -> dict[str, float]:
    """Lengths and ends of the responses, and how far the engine's log-probs of them are from the trainer's."""
    metrics = {
        "rollout/responses": float(len(samples)),
        "rollout/empty_skipped": float(len(samples) - len(kept)),
        "rollout/response_tokens": float(np.mean([len(sample.tokens) for sample in samples])),
        "rollout/truncated_share": float(np.mean([sample.finish_reason == "length" for sample in samples])),
    }
    pairs = [
        (t.statistics["old_logprob"], s.logprobs)
        for t, s in zip(trajectories, kept, strict=True)
        if "old_logprob" in t.statistics
    ]
    if pairs:
        gaps = np.concatenate([np.abs(own.astype(np.float64) - engine) for own, engine in pairs])
        metrics["rollout/sample_logprob_gap"] = float(gaps.mean())
    return metrics
