"""``aligndistil evaluate``: benchmarks' answers by the rollout engines, their judgments, and the paper's figures."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from megatron_aligndistil import __version__
from megatron_aligndistil.config.analysis_rules import as_run
from megatron_aligndistil.config.atomic import write_text
from megatron_aligndistil.config.compose import load_overrides
from megatron_aligndistil.config.evaluation_rules import check, models_of
from megatron_aligndistil.config.evaluation_schema import EVALUATIONS, EvaluationConfig, JudgeConfig
from megatron_aligndistil.config.schema import RunConfig
from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.launch import failures, torchrun
from megatron_aligndistil.launch.log import configure_logging
from megatron_aligndistil.launch.runtime import check_here

if TYPE_CHECKING:
    from megatron_aligndistil.evaluation.benchmark import Answer
    from megatron_aligndistil.evaluation.content_cache import ContentCache
    from megatron_aligndistil.evaluation.judge import Judge
    from megatron_aligndistil.launch.evaluation_task import Evaluation

CACHE = "~/.cache/megatron_aligndistil/evaluation"
RESULTS_FILE = "results.json"


def main(argv: Sequence[str]) -> int:
    """Run one evaluation with the arguments after ``evaluate`` and return the exit code.

    Raises:
        UserError: bad input, in one line.
    """
    arguments = _parser().parse_intermixed_args(argv)
    name = arguments.benchmark
    own = None if arguments.config_name is None else (arguments.config_name, arguments.config_dir or ".")
    if own is None and arguments.config_dir is not None:
        raise ConfigError(f"--config-dir {arguments.config_dir}: has no effect without --config-name; add it")
    config = load_overrides(EVALUATIONS[name], [_spelled_out(text) for text in arguments.overrides], name, own)
    check(config)
    placement = torchrun.placement_from(os.environ)
    configure_logging(0 if placement is None else placement.rank)
    start = time.perf_counter()
    evaluation, ready, cache = _prepared(name, config)
    judge = judge_of(config.judge, cache)
    # Every rank of another launcher: where one alone came to an end, the others would wait for it.
    if judge is not None and failures.LAUNCHER_PID not in os.environ:
        judge.check()
        cache.check()

    def report(answers: Mapping[str, Sequence[Answer]]) -> None:
        _report(name, config, evaluation, answers, judge, (start, argv))

    first = _first_model(config, evaluation)
    answers: Mapping[str, Sequence[Answer]] | None = ready
    if first is not None:
        run = as_run(config, first)
        if placement is None and run.trainer.num_nodes * run.trainer.devices > 1:
            check_here(run)
            return torchrun.launch(("-m", "megatron_aligndistil", "evaluate", *argv), run)
        with torchrun.entered(placement or torchrun.alone(), run):
            check_here(run)
            with _answering(config, run, evaluation, ready, cache) as answers:
                if run.trainer.num_nodes > 1:
                    _while_others_wait(report, answers, judge)
                    return 0
    if answers is not None and (placement is None or placement.rank == 0):
        # A scheduler's SIGTERM, like Ctrl-C, first lets the requests under way come to an end.
        signal.signal(signal.SIGTERM, _interrupted)
        report(answers)
    return 0


def _while_others_wait(
    report: Callable[[Mapping[str, Sequence[Answer]]], None],
    answers: Mapping[str, Sequence[Answer]] | None,
    judge: Judge | None,
) -> None:
    """Judge and report on the first rank. A node whose ranks had ended would be taken for lost by the others."""
    from megatron_aligndistil.parallel.waiting import made_by_first_rank

    def work(stop: threading.Event) -> None:
        assert answers is not None
        if judge is not None:
            judge.stop = stop
        report(answers)

    signal.signal(signal.SIGTERM, _interrupted)
    made_by_first_rank(work, "judging", lambda: False)


def _interrupted(number: int, frame: FrameType | None) -> None:
    """As Ctrl-C, once: a launcher says it again and again."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _spelled_out(text: str) -> str:
    """``model=<path>`` is short for ``model.restore_from_path=<path>``."""
    return text.replace("model=", "model.restore_from_path=", 1) if text.startswith("model=") else text


def _prepared(name: str, config: EvaluationConfig) -> tuple[Evaluation, dict[str, Sequence[Answer]], ContentCache]:
    """The benchmark, and answers that are there already: whatever files are wrong shows here."""
    from megatron_aligndistil.evaluation.content_cache import ContentCache

    module: Any = import_module(f"{__package__}.evaluate_{name.replace('-', '_')}")
    evaluation: Evaluation = module.prepare(config)
    ready: dict[str, Sequence[Answer]] = {
        name: evaluation.read_answers(f"outputs.{name}", Path(path).expanduser())
        for name, path in config.outputs.items()
    }
    return evaluation, ready, ContentCache(Path(config.cache_dir or CACHE).expanduser())


def judge_of(settings: JudgeConfig, cache: ContentCache, section: str = "judge") -> Judge | None:
    """The judge of a ``section`` of the configuration, None where none is asked for."""
    from megatron_aligndistil.evaluation.judge import Endpoint, Judge

    if settings.base_url is None or settings.model is None:
        return None
    key = None if settings.api_key_variable is None else os.environ[settings.api_key_variable]
    waits = settings.timeout_seconds, settings.attempts, settings.concurrency
    return Judge(Endpoint(settings.base_url, settings.model, key, *waits, settings.extra_body, section), cache)


def _first_model(config: EvaluationConfig, evaluation: Evaluation) -> str | None:
    """Whose tokenizer the layout's run names; None where no model is needed."""
    paths = [named.path for named in evaluation.reward_models] + [path for _, path in models_of(config).values()]
    return paths[0] if paths else None


@contextmanager
def _answering(
    config: EvaluationConfig,
    run: RunConfig,
    evaluation: Evaluation,
    ready: Mapping[str, Sequence[Answer]],
    cache: ContentCache,
) -> Iterator[dict[str, Sequence[Answer]] | None]:
    """Every model's answers, in the order that they were named in, while the process groups are there.

    None on all ranks but the first.
    """
    from megatron_aligndistil.launch import analysis_bench
    from megatron_aligndistil.launch.evaluation_answers import Respondent

    models = {name: analysis_bench.Named(key, path) for name, (key, path) in models_of(config).items()}
    every = [*evaluation.reward_models, *models.values()]
    analysis_bench.check_models(run, every)
    if evaluation.reward_models:
        analysis_bench.check_tokenizers(every)
    with analysis_bench.bench(run) as bench:
        drawn = {
            name: Respondent(bench, config, evaluation.max_new_tokens, cache, name, named).conversations(
                evaluation.questions
            )
            for name, named in models.items()
        }
        evaluation.measure(bench, drawn, ready)
        answers = {name: [own.answer for own in conversations] for name, conversations in drawn.items()}
        yield None if int(os.environ["RANK"]) else answers | dict(ready)


def _report(
    name: str,
    config: EvaluationConfig,
    evaluation: Evaluation,
    answers: Mapping[str, Sequence[Answer]],
    judge: Judge | None,
    began: tuple[float, Sequence[str]],
) -> None:
    scored, folder = evaluation.score(answers, judge), Path(config.output).expanduser()
    start, argv = began
    asked = None
    if judge is not None:
        asked = {"model": judge.endpoint.model, "base_url": judge.endpoint.base_url, **asdict(judge.usage)}
    drawn = _drawn(answers)
    results = {
        "benchmark": name,
        "version": __version__,
        "judge": asked,
        "answers": {model: vars(own) for model, own in drawn.items()},
        "models": scored.results,
    }
    settings = {
        "benchmark": name,
        "version": __version__,
        "arguments": list(argv),
        "models": {name: str(Path(path).expanduser().resolve()) for name, (_, path) in models_of(config).items()},
        "config": asdict(config),
        "seconds": round(time.perf_counter() - start, 1),
    }
    results_text = json.dumps(_plain(results), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    report = replace(scored.report, notes=[*scored.report.notes, *_sampling_note(config, evaluation, drawn)])
    try:
        for file, text in {**scored.files, RESULTS_FILE: results_text}.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            write_text(folder / file, text)
        report.write(folder, settings)
    except OSError as error:
        where = error.filename2 or error.filename or folder
        raise ConfigError(
            f"output={config.output}: cannot write {where} ({error.strerror or error}); make room there, or name "
            "another folder: the same command finds all answers and judgments"
        ) from error
    print(f"{report.markdown}\n{folder}", flush=True)


def _plain(value: Any) -> Any:
    """As JSON has it, which knows no NaN: a figure that there isn't is null."""
    if isinstance(value, Mapping):
        return {key: _plain(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Drawn:
    """Answers that models gave here; unfinished ones came to no end token, cut prompts lost their beginning.

    ``cramped_turns`` had less room, beside their prompt, than an answer may have tokens.
    """

    answers: int
    tokens: int
    unfinished: int
    cut_prompts: int
    cramped_turns: int


def _drawn(answers: Mapping[str, Sequence[Answer]]) -> dict[str, Drawn]:
    return {
        model: Drawn(
            len(own),
            sum(answer.tokens or 0 for answer in own),
            sum(answer.ended is False for answer in own),
            sum(answer.cut for answer in own),
            sum(answer.cramped for answer in own),
        )
        for model, own in answers.items()
        if any(answer.tokens is not None for answer in own)
    }


def _sampling_note(config: EvaluationConfig, evaluation: Evaluation, drawn: Mapping[str, Drawn]) -> list[str]:
    if not drawn:
        return []
    sampling = config.sampling
    temperature = "as the benchmark says" if sampling.temperature is None else f"{sampling.temperature:g}"
    troubles = [
        f"{model}: {own.unfinished} of {own.answers} unfinished, {own.cut_prompts} prompts cut, {own.cramped_turns} "
        "turns with less room"
        for model, own in drawn.items()
    ]
    return [
        f"Answers by {sampling.engine}, temperature {temperature}, top-p {sampling.top_p:g}, top-k {sampling.top_k}, "
        f"at most {sampling.max_new_tokens or evaluation.max_new_tokens} tokens a turn, "
        f"{config.model.encoder_seq_length} with what is before them, seed {config.seed}. "
        f"{'; '.join(troubles)}."
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{failures.PROGRAM} evaluate",
        description="Evaluate models by benchmarks; writes tables, raw judgments and settings to output=<folder>.",
        epilog=(
            "benchmarks:\n"
            "  alpaca_eval      AlpacaEval 2: win rate and length-controlled win rate (Table 1)\n"
            "  mt_bench         MT-Bench: ratings of both turns (Table 1)\n"
            "  arena_hard       Arena-Hard v0.1: win rate, and under style control (Table 1)\n"
            "  tldr             summaries: win rate over a baseline by a judge, mean reward (Table 4)\n"
            "  pairwise         the same for any prompts\n"
            "  reward           mean reward of answers\n"
            "  judge-agreement  how far a judge agrees with people's preferences (Table 6)\n\n"
            "example:\n"
            "  aligndistil evaluate mt_bench output=results/mt_bench model=runs/aligned benchmark.folder=mt_bench \\\n"
            "      judge.base_url=http://judge:8000/v1 judge.model=Qwen/Qwen2.5-72B-Instruct\n\n"
            "A YAML of your own begins with 'defaults: [<benchmark>, _self_]'."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("benchmark", choices=list(EVALUATIONS), metavar="benchmark")
    parser.add_argument("--config-name", "-cn", metavar="NAME", help="a YAML of your own")
    parser.add_argument("--config-dir", "-cd", metavar="DIR", help="where it is; default: the current folder")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="Hydra overrides; config/evaluation_schema.py lists all"
    )
    return parser
