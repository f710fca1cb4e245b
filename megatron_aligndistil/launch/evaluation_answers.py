"""Models' answers to a benchmark's questions, turn by turn, through the rollout engines; none is drawn twice.

Shapes: T tokens of an answer.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from megatron_aligndistil.checkpoint.identity import content_of
from megatron_aligndistil.checkpoint.locate import metadata_source
from megatron_aligndistil.config.analysis_schema import SamplingConfig
from megatron_aligndistil.config.evaluation_schema import EvaluationConfig
from megatron_aligndistil.data.chat import ChatFormat, stop_token_ids
from megatron_aligndistil.data.tokenize import LengthPolicy, tokenize
from megatron_aligndistil.data.tokenizer import load_tokenizer
from megatron_aligndistil.errors import DataError
from megatron_aligndistil.evaluation.benchmark import Answer, Question
from megatron_aligndistil.evaluation.content_cache import ContentCache
from megatron_aligndistil.launch.analysis_answers import engines_of
from megatron_aligndistil.launch.analysis_bench import Bench, Named
from megatron_aligndistil.parallel import collectives, groups
from megatron_aligndistil.rollout.engine import Request, Sampling, seed_of
from megatron_aligndistil.rollout.engine_group import EngineGroup
from megatron_aligndistil.types import Example, Message, Record
from megatron_aligndistil.types import Sequence as TokenSequence

logger = logging.getLogger(__name__)

SAMPLING = "sampling"  # the section of how answers are drawn
VLLM_WINDOW = 256  # answers drawn between two writes to the cache; of transformers a batch a rank


@dataclass
class Conversation:
    """A question's messages so far, and of its newest answer the whole sequence of tokens.

    cut      prompts that had to lose their beginning to leave room for an answer
    cramped  turns with less room than the benchmark gives an answer
    ended    whether every answer came to its end token
    """

    messages: list[Message]
    turns: list[str] = field(default_factory=list)
    tokens: int = 0
    sequence: TokenSequence | None = None
    cut: int = 0
    cramped: int = 0
    ended: bool = True

    @property
    def answer(self) -> Answer:
        """What a benchmark sees of it."""
        return Answer(tuple(self.turns), self.tokens, self.ended, self.cut, self.cramped)


@dataclass(frozen=True)
class Drawn:
    """An answer's tokens int32 [T] as the cache has them."""

    tokens: list[int]
    ended: bool


@dataclass(frozen=True)
class Respondent:
    """A model that answers up to ``max_new_tokens`` a turn; rank 0 alone asks the cache."""

    bench: Bench
    config: EvaluationConfig
    max_new_tokens: int
    cache: ContentCache
    name: str
    named: Named

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own, with the configuration's chat template."""
        return load_tokenizer(str(metadata_source(self.named.path)), self.config.model.data.chat_template)

    def conversations(self, questions: Sequence[Question]) -> list[Conversation]:
        """The model's answers to all turns, the same on every rank.

        Raises:
            RolloutError: the engine doesn't start, or logits aren't finite.
            DataError: a prompt cannot be rendered.
        """
        found = [Conversation(list(question.prompt)) for question in questions]
        own = content_of(self.named.path) if groups.world().rank == 0 else None
        model = {"model": collectives.from_first_rank(own)}
        with ExitStack() as stack:
            engines: list[EngineGroup] = []

            def engine() -> EngineGroup:
                if not engines:
                    folder = Path(self.config.output).expanduser() / "engines" / self.name
                    engines.append(
                        stack.enter_context(engines_of(self.bench, self.named, self._sampling(), folder, SAMPLING))
                    )
                return engines[0]

            for turn in range(1 + max((len(question.further_turns) for question in questions), default=0)):
                asked = [i for i, question in enumerate(questions) if turn <= len(question.further_turns)]
                for i in asked if turn else ():
                    found[i].messages.append({"role": "user", "content": questions[i].further_turns[turn - 1]})
                wanted = {i: self._wanted(questions[i], found[i], i, turn) for i in asked}
                drawn = self._known(model, wanted)
                missing = {i: wanted[i] for i in asked if i not in drawn}
                logger.info("%s, turn %d: %d answers, %d known", self.name, turn + 1, len(asked), len(drawn))
                if missing:
                    drawn |= self._draw(engine(), missing, model)
                for i in asked:
                    self._say(found[i], wanted[i], drawn[i])
        return found

    def _wanted(self, question: Question, conversation: Conversation, place: int, turn: int) -> dict[str, Any]:
        """What is asked of the model, as the cache's key and the engine's request have it."""
        chat = ChatFormat(self.tokenizer)
        try:
            prompt = chat.token_ids([chat.prompt_text(conversation.messages)])[0]
        except DataError as error:
            raise DataError(f"{question.origin}: {error}") from error
        given = self.config.sampling
        longest = given.max_new_tokens or self.max_new_tokens
        length = self.config.model.encoder_seq_length
        if len(prompt) >= length:
            conversation.cut += 1
            prompt = prompt[-(length - min(longest, length // 2)) :]
        room = min(longest, length - len(prompt))
        conversation.cramped += room < longest
        temperature = question.temperature if given.temperature is None else given.temperature
        vllm = given.vllm
        return {
            "prompt": prompt,
            "max_new_tokens": room,
            "temperature": temperature,
            "top_p": given.top_p,
            "top_k": given.top_k,
            "stops": stop_token_ids(self.tokenizer),
            # Greedy answers are the same whatever the seed and the place.
            "seed": seed_of(self.config.seed, "evaluation", place, turn) if temperature > 0 else 0,
            "engine": ["vllm", vllm.dtype, *vllm.extra_args] if given.engine == "vllm" else [given.engine],
            "precision": str(self.config.trainer.precision),
        }

    def _known(self, model: Mapping[str, Any], wanted: Mapping[int, dict[str, Any]]) -> dict[int, Drawn]:
        """The answers that the cache has, on every rank."""
        known = None
        if groups.world().rank == 0:
            values = {i: self.cache.get({**model, **own}) for i, own in wanted.items()}
            known = {i: Drawn(**value) for i, value in values.items() if value is not None}
        found = collectives.from_first_rank(known)
        assert found is not None
        return found

    def _draw(
        self, engine: EngineGroup, missing: Mapping[int, dict[str, Any]], model: Mapping[str, Any]
    ) -> dict[int, Drawn]:
        drawn: dict[int, Drawn] = {}
        first = groups.world().rank == 0
        bar = tqdm(total=len(missing), desc=self.name, unit="answer", dynamic_ncols=True, disable=not first)
        with bar:
            for how, window in self._windows(missing):
                requests = [Request(np.array(missing[i]["prompt"], np.int32), missing[i]["seed"]) for i in window]
                for i, sample in zip(window, engine.generate(requests, how), strict=True):
                    room = missing[i]["max_new_tokens"]
                    ended = sample.finish_reason == "stop" and len(sample.tokens) <= room
                    drawn[i] = Drawn(sample.tokens[:room].tolist(), ended)
                    if first:
                        self.cache.put({**model, **missing[i]}, vars(drawn[i]))
                bar.update(len(window))
        return drawn

    def _windows(self, missing: Mapping[int, dict[str, Any]]) -> Iterator[tuple[Sampling, list[int]]]:
        """Requests that are sampled alike, so many at a time; long prompts, which leave less room, come last.

        vLLM ends each answer where its room does, so that a window is given the most room that one of it has.
        """
        given = self.config.sampling
        alike: dict[Sampling, list[int]] = defaultdict(list)
        for i in sorted(missing, key=lambda i: -missing[i]["max_new_tokens"]):
            own = missing[i]
            room = 0 if given.engine == "vllm" else own["max_new_tokens"]
            alike[Sampling(room, own["temperature"], own["top_p"], own["top_k"], tuple(own["stops"]))].append(i)
        size = VLLM_WINDOW if given.engine == "vllm" else given.hf_batch_size * groups.world().size
        for how, places in alike.items():
            for start in range(0, len(places), size):
                window = places[start : start + size]
                yield replace(how, max_new_tokens=missing[window[0]]["max_new_tokens"]), window

    def _say(self, conversation: Conversation, wanted: Mapping[str, Any], drawn: Drawn) -> None:
        text = str(self.tokenizer.decode(drawn.tokens, skip_special_tokens=True)).strip()
        conversation.messages.append({"role": "assistant", "content": text})
        conversation.turns.append(text)
        conversation.tokens += len(drawn.tokens)
        conversation.ended &= drawn.ended
        prompt = wanted["prompt"]
        conversation.sequence = TokenSequence(np.array(prompt + drawn.tokens, np.int32), len(prompt))

    def _sampling(self) -> SamplingConfig:
        """As far as it concerns an engine's start."""
        given = self.config.sampling
        return SamplingConfig(
            engine=given.engine,
            sync_bucket_mib=given.sync_bucket_mib,
            hf_batch_size=given.hf_batch_size,
            vllm=given.vllm,
        )


def tokenized(bench: Bench, questions: Sequence[Question], answers: Sequence[str]) -> list[Example]:
    """Ready answers as sequences by the bench's tokenizer; a prompt or an answer that is too long is cut."""
    records = [
        Record(question.origin, question.prompt, (answer,)) for question, answer in zip(questions, answers, strict=True)
    ]
    length = bench.run.model.encoder_seq_length
    policy = LengthPolicy(length - 1, length, "truncate_left", "truncate_right")
    return [
        Example(row.origin, (TokenSequence(np.array(row.prompt + row.responses[0], np.int32), len(row.prompt)),))
        for row in tokenize(records, ChatFormat(bench.tokenizer()), policy)
    ]
