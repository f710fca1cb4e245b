"""``aligndistil analyze tokens``: weight, TVD, reward and divergences of every token of some responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_aligndistil.algorithms.statistics import hidden_states
from megatron_aligndistil.config.analysis_schema import SamplingConfig, TokensAnalysisConfig
from megatron_aligndistil.evaluation.passes import Listed
from megatron_aligndistil.evaluation.token_figures import FIGURES, token_figures
from megatron_aligndistil.kernels.extrapolated_kl import Extrapolation
from megatron_aligndistil.kernels.settings import KernelSettings
from megatron_aligndistil.launch.analysis_answers import draw
from megatron_aligndistil.launch.analysis_bench import HIDDEN_WINDOW, Bench, Named
from megatron_aligndistil.report.analysis import Cell, Report, Table
from megatron_aligndistil.report.chart import Axes, line_chart
from megatron_aligndistil.report.token_heat_map import ShownResponse, heat_map
from megatron_aligndistil.types import Example

NAME, HTML_FILE = "tokens", "tokens.html"
STRONGEST = 10  # tokens of the second table
TITLES = {
    "alpha": "α_t",
    "tvd": "TVD_t",
    "reward": "β₀ log π_d/π_r",
    "kl_to_teacher": "KL(π ‖ π*)",
    "kl_to_dpo": "KL(π ‖ π_d)",
}


@dataclass(frozen=True)
class Response:
    """A response: where it is from, its prompt's text, its tokens, and their figures [T] by name."""

    origin: str
    prompt: str
    token_ids: Sequence[int]
    tokens: Sequence[str]
    figures: Mapping[str, np.ndarray]


def models_of(config: TokensAnalysisConfig) -> list[Named]:
    """The teachers, and the policy where there is one."""
    given = {name: path for name, path in vars(config.models).items() if path is not None}
    return [Named(f"models.{name}", path) for name, path in given.items()]


def measure(config: TokensAnalysisConfig, bench: Bench) -> list[Response]:
    """The responses with their figures, on every rank."""
    settings = config.analysis
    examples = _examples(config, bench)
    extrapolation = Extrapolation(settings.weight, settings.alpha, settings.epsilon, settings.tvd_scale)  # type: ignore[arg-type]
    named = models_of(config)
    models = {key.removeprefix("models."): own for key, own in bench.models(named, hidden_states).items()}
    compute = token_figures(extrapolation, settings.beta0, KernelSettings.of(bench.run.model.kernel))
    figures = bench.passes(HIDDEN_WINDOW).run(models, hidden_states, compute, Listed(examples))
    tokenizer = bench.tokenizer()
    responses = []
    for example, own in zip(examples, figures, strict=True):
        (sequence,) = example.sequences
        ids = sequence.tokens[sequence.prompt_length :].tolist()
        prompt = str(tokenizer.decode(sequence.tokens[: sequence.prompt_length].tolist()))
        texts = [str(tokenizer.decode([token])) for token in ids]
        shown = {name: own[name] for name in FIGURES if name in own}
        responses.append(Response(example.origin, prompt, ids, texts, shown))
    return responses


def _examples(config: TokensAnalysisConfig, bench: Bench) -> list[Example]:
    settings = config.analysis
    greedy = settings.responses == "greedy"
    loaded = bench.examples(settings.data, *(("prompt",) if greedy else ("demonstration", settings.responses)))
    first = loaded[list(range(len(loaded) if settings.limit == -1 else min(settings.limit, len(loaded))))]
    if not greedy:
        return first
    own = "dpo" if config.models.policy is None else "policy"
    named = next(model for model in models_of(config) if model.key == f"models.{own}")
    sampling = SamplingConfig(max_new_tokens=settings.max_new_tokens)
    drawn = draw(bench, named, first, sampling, Path(config.output).expanduser() / "engine")
    return [Example(prompt.origin, answer.sequences) for prompt, answer in zip(first, drawn.sequences, strict=True)]


def report(config: TokensAnalysisConfig, responses: Sequence[Response]) -> Report:
    """A row a response, the tokens of the largest weight, all tokens as CSV and as a heat map."""
    settings = config.analysis
    names = list(responses[0].figures)
    weight = f"α = {settings.alpha:g}" + (
        f", ε = {settings.epsilon:g}, TVD times {settings.tvd_scale:g}" if settings.weight == "adaptive" else ""
    )
    shown = [ShownResponse(own.origin, own.prompt, own.tokens, own.figures) for own in responses]
    title = f"Response tokens by {TITLES[settings.colour]}"
    lines = {own.origin: list(enumerate(own.figures[settings.colour].tolist(), 1)) for own in responses}
    return Report(
        name=NAME,
        title="Token figures",
        tables=[_means(responses, names), _strongest(responses, names, settings.colour)],
        columns=("response", "position", "token_id", "token", *names),
        records=_records(responses, names),
        charts={f"{NAME}.svg": line_chart(lines, Axes(title, "response token", TITLES[settings.colour]))},
        notes=[
            f"Weight {settings.weight}, {weight}; β₀ = {settings.beta0:g}; {settings.responses} responses. Divergences "
            f"are the policy's, in nats. All tokens: `{NAME}.csv`; coloured: `{HTML_FILE}`."
        ],
        files={HTML_FILE: heat_map(shown, settings.colour, TITLES)},
    )


def _means(responses: Sequence[Response], names: Sequence[str]) -> Table:
    rows = [
        [own.origin, str(len(own.tokens)), *(f"{own.figures[name].mean():.4f}" for name in names)] for own in responses
    ]
    return Table(["response", "tokens", *(f"mean {TITLES[name]}" for name in names)], rows, "Means over each response")


def _strongest(responses: Sequence[Response], names: Sequence[str], colour: str) -> Table:
    found = sorted(
        ((abs(float(own.figures[colour][i])), own, i) for own in responses for i in range(len(own.tokens))),
        key=lambda entry: -entry[0],
    )
    rows = [
        [f"`{_shown(own.tokens[i])}`", f"{own.origin}", str(i + 1), *(f"{own.figures[name][i]:.4f}" for name in names)]
        for _, own, i in found[:STRONGEST]
    ]
    header = ["token", "response", "position", *(TITLES[name] for name in names)]
    return Table(header, rows, f"Tokens of the largest {TITLES[colour]}")


def _shown(token: str) -> str:
    """A token inside a cell of Markdown."""
    return repr(token)[1:-1].replace("|", "\\|").replace("`", "'")


def _records(responses: Sequence[Response], names: Sequence[str]) -> list[tuple[Cell, ...]]:
    return [
        (own.origin, i + 1, own.token_ids[i], token, *(float(own.figures[name][i]) for name in names))
        for own in responses
        for i, token in enumerate(own.tokens)
    ]
