"""AlpacaEval 2 by its own library: it formats, shuffles, parses and scores; the judge is asked through ``Judge``."""

from __future__ import annotations

import importlib
import json
import logging
import math
import re
import shutil
import statistics
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_aligndistil.config.atomic import write_text
from megatron_aligndistil.errors import ConfigError, DataError, reason
from megatron_aligndistil.evaluation.intervals import Estimate, Z
from megatron_aligndistil.evaluation.judge import ChatReply, ChatRequest, Judge
from megatron_aligndistil.types import Message

REPOSITORY = "tatsu-lab/alpaca_eval"  # on the hub, with the benchmark's files
GAMED, DIFFICULTY = "df_gamed.csv", "instruction_difficulty.csv"
OFFICIAL = "weighted_alpaca_eval_gpt4_turbo"  # whose prompt and parser are used
INSTALL = "pip install 'megatron-aligndistil[evaluation]'"

_CONFIG, _PROMPT = "configs.yaml", "prompt.txt"
_FIRST = 8  # requests by which an endpoint shows that it tells log-probabilities
# ChatML's marks within an answer would cut the judge's prompt. As long as they are, since length is what counts.
_MARKS = {"<|im_start|>": "\ue000" * 12, "<|im_end|>": "\ue001" * 10}
_REVISION = "0" * 40
_NOTHING: dict[str, Any] = {"logprobs": {"content": [{"top_logprobs": []}]}}  # a reply without a preference


@dataclass(frozen=True)
class Pair:
    """An instruction with the reference's output and a model's."""

    instruction: str
    reference: str
    output: str


@dataclass(frozen=True)
class Judgment:
    """A judge's view of a pair.

    reference_first  whether the judge saw the reference's output as "m"
    choice           its reply; None where it was skipped, or not asked since both outputs are the same
    preference       1 for the reference to 2 for the model; None where there is none
    """

    reference_first: bool
    choice: Mapping[str, Any] | None
    preference: float | None


@dataclass(frozen=True)
class Figures:
    """A model against the reference; per cent, and the library's standard errors, by which the intervals are made.

    The length-controlled rate is NaN where all length differences are the same, since the fit then has no scale. It is
    a prediction for every instruction, by a fit to those that have a preference.
    """

    win_rate: Estimate
    length_controlled: Estimate
    win_rate_error: float
    length_controlled_error: float
    discrete_win_rate: float
    wins: int
    losses: int
    draws: int
    judged: int
    unparsed: int
    skipped: int
    characters: float


def check_installed() -> None:
    """Raise ConfigError where the library cannot be imported."""
    with _contained():
        pass


def judge_pairs(
    judge: Judge, folder: Path, pairs: Sequence[Pair], names: tuple[str, str], max_tokens: int | None = None
) -> list[Judgment]:
    """What the judge says of every pair, in order.

    Its configuration and prompt, which are the library's ``OFFICIAL`` ones, are written to ``folder``. ``names``: the
    reference's and the model's. ``max_tokens`` of a judgment; default: the library's.

    Raises:
        DataError: as ``Judge.ask``, or the endpoint tells no log-probabilities, or none of "m" and "M".
    """
    rows = [(_hidden(pair.instruction), _hidden(pair.reference), _hidden(pair.output)) for pair in pairs]
    with _contained() as library:
        evaluator = _written(library, folder, judge.endpoint.model, max_tokens)
        completions = _Completions(library, judge)
        annotator = library.annotators.PairwiseAnnotator(
            annotators_config=evaluator,
            base_dir=folder,
            fn_completions=completions,
            caching_path=None,  # the judge's cache keeps replies
            is_avoid_reannotations=False,
        )
        sides = [
            [{"instruction": row[0], "output": row[side], "generator": names[side - 1]} for row in rows]
            for side in (1, 2)
        ]
        annotated = annotator.annotate_head2head(*sides, is_ordered=True, chunksize=None)
        presented = _presented(library, annotator, annotated)
    kept = [(own["instruction"], own["output_1"], own["output_2"]) for own in annotated]
    assert kept == rows, "the library returned other pairs, or in another order"
    judgments = [
        # The library drops the replies without a preference.
        Judgment(reference_first, completions.choices.get(prompt), _number(own["preference"]))
        for own, (reference_first, prompt) in zip(annotated, presented, strict=True)
    ]
    if not any(own.preference is not None for own in judgments):
        raise _unusable(judge, 'tell "m" or "M" in none of their likely first tokens, so that no preference is known')
    return judgments


def figures(files: Mapping[str, Path], pairs: Sequence[Pair], judgments: Sequence[Judgment]) -> Figures:
    """The library's figures of judgments; ``files``: where ``GAMED`` and ``DIFFICULTY`` are."""
    rows = [
        {
            "instruction": pair.instruction,
            "output_1": pair.reference,
            "output_2": pair.output,
            "generator_1": "reference",  # of equal names it would say 50 without a fit
            "generator_2": "model",
            "preference": own.preference,
        }
        for pair, own in zip(pairs, judgments, strict=True)
    ]
    differences = {len(pair.reference) - len(pair.output) for pair in pairs}
    with _contained() as library, _hub_files(library, files):
        if len(differences) > 1:
            found = library.metrics.get_length_controlled_winrate(
                rows, save_weights_dir=None, is_warn_extreme_changes=False
            )
        else:
            found = library.metrics.get_winrate(rows)
    rate, error = float(found["win_rate"]), float(found["standard_error"])
    controlled = float(found.get("length_controlled_winrate", math.nan))
    controlled_error = float(found.get("lc_standard_error", math.nan))
    missing = [own for own in judgments if own.preference is None]
    return Figures(
        win_rate=_interval(rate, error),
        length_controlled=_interval(controlled, controlled_error),
        win_rate_error=error,
        length_controlled_error=controlled_error,
        discrete_win_rate=float(found["discrete_win_rate"]),
        wins=int(found["n_wins"]),
        losses=int(found["n_wins_base"]),
        draws=int(found["n_draws"]),
        judged=int(found["n_total"]),
        unparsed=sum(own.choice is not None for own in missing),
        skipped=sum(own.choice is None for own in missing),
        characters=statistics.fmean(len(pair.output) for pair in pairs),
    )


class _Completions:
    """What the library calls for completions of its prompts; ``choices``: prompt → its reply's, None if skipped."""

    def __init__(self, library: Any, judge: Judge) -> None:
        self._library, self._judge = library, judge
        self.choices: dict[str, Mapping[str, Any] | None] = {}

    def __call__(
        self, prompts: Sequence[str], max_tokens: int, temperature: float, top_logprobs: int, **_: Any
    ) -> dict[str, list[Any]]:
        requests = [
            ChatRequest(self._messages(prompt), max_tokens, float(temperature), top_logprobs) for prompt in prompts
        ]
        replies = self._asked(requests)
        self.choices |= {
            prompt: None if reply is None else reply.choice for prompt, reply in zip(prompts, replies, strict=True)
        }
        return {
            "completions": ["" if reply is None else reply.text for reply in replies],
            "completions_all": [_NOTHING if reply is None else dict(reply.choice) for reply in replies],
            "price_per_example": [0.0] * len(replies),
            "time_per_example": [0.0] * len(replies),
        }

    def _messages(self, prompt: str) -> tuple[Message, ...]:
        turns = self._library.utils.prompt_to_chatml(prompt)
        return tuple({"role": turn["role"], "content": _shown(turn["content"])} for turn in turns)

    def _asked(self, requests: Sequence[ChatRequest]) -> list[ChatReply | None]:
        """A few first: an endpoint that tells no log-probabilities isn't asked hundreds of times."""
        replies = self._judge.ask(requests[:_FIRST])
        self._check(replies)
        return replies + self._judge.ask(requests[_FIRST:])

    def _check(self, replies: Sequence[ChatReply | None]) -> None:
        if any(_told(reply) for reply in replies if reply is not None) or not any(replies):
            return
        raise _unusable(self._judge, "carry no log-probabilities, by which AlpacaEval 2 weighs preferences")


def _unusable(judge: Judge, what: str) -> DataError:
    endpoint = judge.endpoint
    return DataError(
        f"{endpoint.key}.base_url={endpoint.base_url}: the replies {what}; serve {endpoint.key}.model={endpoint.model} "
        "with log-probabilities, as vLLM does, or name another judge"
    )


def _told(reply: ChatReply) -> bool:
    try:
        return bool(reply.choice["logprobs"]["content"][0]["top_logprobs"])
    except (KeyError, IndexError, TypeError):
        return False


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def _presented(library: Any, annotator: Any, annotated: Sequence[Mapping[str, Any]]) -> list[tuple[bool, str]]:
    """Whether the library's random switch left the reference's output in the first place, and the prompt."""
    import pandas

    frame = pandas.DataFrame.from_records(annotated)[["instruction", "output_1", "output_2"]]
    (single,) = annotator.annotators.values()
    switched = frame
    for processor in single.processors:
        switched = processor.preprocess(switched)
    prompts, _ = library.utils.make_prompts(switched, single.prompt_template)
    first = switched["output_1"] == frame["output_1"]
    return [(bool(own), prompt) for own, prompt in zip(first, prompts, strict=True)]


def _written(library: Any, folder: Path, judge: str, max_tokens: int | None) -> str:
    """Write the evaluator where the library looks for it; its name, which is its folder's."""
    official = library.constants.EVALUATORS_CONFIG_DIR
    config = library.utils.load_configs(official / OFFICIAL)[OFFICIAL]
    prompt = library.utils.read_or_return(config["prompt_template"], relative_to=official)
    del config["fn_completions"]  # given as a function
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", judge)
    config["prompt_template"] = f"{name}/{_PROMPT}"
    config["completions_kwargs"]["model_name"] = judge
    # The identifier is the reply's first token, however many there are.
    config["completion_parser_kwargs"]["log_prob_index"] = 0
    if max_tokens is not None:
        config["completions_kwargs"]["max_tokens"] = max_tokens
    own = folder / name
    own.mkdir(parents=True, exist_ok=True)
    write_text(own / _PROMPT, prompt)
    write_text(own / _CONFIG, yaml.safe_dump({name: config}, sort_keys=False))
    return name


@contextmanager
def _contained() -> Iterator[Any]:
    """The library, whose changes to the process's logging and to scikit-learn's configuration end with this."""
    root, muted = logging.getLogger(), lambda record: False
    handlers, level = list(root.handlers), root.level
    root.addFilter(muted)  # what it says goes through the root logger itself; other loggers aren't filtered by it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it calls, and will be no more
            library = _library()
            root.setLevel(level)
            with importlib.import_module("sklearn").config_context():
                yield library
    finally:
        root.removeFilter(muted)
        root.setLevel(level)
        root.handlers[:] = handlers


def _library() -> Any:
    try:
        library = importlib.import_module("alpaca_eval")
        for part in ("annotators", "constants", "metrics", "processors", "utils"):
            importlib.import_module(f"alpaca_eval.{part}")
    except ImportError as error:
        raise ConfigError(f"alpaca_eval: cannot be imported ({reason(error)}); {INSTALL}") from error
    return library


@contextmanager
def _hub_files(library: Any, files: Mapping[str, Path]) -> Iterator[None]:
    """Files where the library looks them up: as a hub cache's, and no network is tried."""
    from huggingface_hub import constants as hub

    settings = library.constants
    before = settings.DEFAULT_CACHE_DIR, settings.DATASETS_FORCE_DOWNLOAD, hub.HF_HUB_OFFLINE
    with tempfile.TemporaryDirectory(prefix="alpaca_eval_") as temporary:
        cached = Path(temporary) / f"datasets--{REPOSITORY.replace('/', '--')}"
        snapshot = cached / "snapshots" / _REVISION
        snapshot.mkdir(parents=True)
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text(_REVISION)
        for name in (GAMED, DIFFICULTY):
            shutil.copyfile(files[name], snapshot / name)
        try:
            settings.DEFAULT_CACHE_DIR, settings.DATASETS_FORCE_DOWNLOAD, hub.HF_HUB_OFFLINE = temporary, False, True
            yield
        finally:
            settings.DEFAULT_CACHE_DIR, settings.DATASETS_FORCE_DOWNLOAD, hub.HF_HUB_OFFLINE = before


def _hidden(text: str) -> str:
    for mark, stand_in in _MARKS.items():
        text = text.replace(mark, stand_in)
    return text


def _shown(text: str) -> str:
    for mark, stand_in in _MARKS.items():
        text = text.replace(stand_in, mark)
    return text


def _interval(value: float, error: float) -> Estimate:
    return Estimate(value, value - Z * error, value + Z * error)


def judgment_line(row: str, judgment: Judgment) -> str:
    """A line of JSON: what the judge saw first, its reply, and the preference from 1 (reference) to 2 (model)."""
    shown = "reference" if judgment.reference_first else "model"
    values = {"row": row, "first": shown, "reply": judgment.choice, "preference": judgment.preference}
    return json.dumps(values, ensure_ascii=False) + "\n"
