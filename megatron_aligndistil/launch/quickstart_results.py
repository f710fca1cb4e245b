"""What the quickstart measures on the models that it has made, and how it shows that."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from megatron_aligndistil.data.chat import ChatFormat
from megatron_aligndistil.data.tokenize import LengthPolicy, tokenize
from megatron_aligndistil.data.tokenizer import load_tokenizer
from megatron_aligndistil.evaluation.contrastive import Predictions, TokenMeans, predict, token_means
from megatron_aligndistil.evaluation.generate import greedy_answers
from megatron_aligndistil.launch.quickstart_pairs import PROPERTY_RULE, Pair, property_rate
from megatron_aligndistil.launch.quickstart_recipe import Folders, Recipe
from megatron_aligndistil.launch.quickstart_stages import Stages
from megatron_aligndistil.report.chart import Axes, line_chart
from megatron_aligndistil.report.quickstart import (
    REPORT_FILE,
    CrossCheck,
    Example,
    ModelRow,
    QuickstartResult,
    examples_text,
    results_table,
    write,
)
from megatron_aligndistil.report.run_metrics import read_metrics, training_curve, validations
from megatron_aligndistil.types import Message, Record
from megatron_aligndistil.types import Sequence as TokenSequence

SHOWN = ("initial", "dpo", "aligndistil")  # the table's rows; the reverse DPO model is a means
EVALUATED = (*SHOWN, "reverse_dpo")
EXAMPLES = 3
BATCH = 12
COMPARED = ("expected_reward", "kl_to_initial")


@dataclass(frozen=True)
class Outcome:
    """Figures of each shown model, and its answers to the held-out questions in their order."""

    questions: Sequence[str]
    means: dict[str, TokenMeans]
    answers: dict[str, list[str]]


def evaluate(recipe: Recipe, folders: Folders, heldout: Sequence[Pair]) -> Outcome:
    """Figures and greedy answers of the exported models in float32, one model in memory at a time."""
    transformers_logging.disable_progress_bar()
    tokenizer = load_tokenizer(str(folders.initial_huggingface))
    sequences = heldout_sequences(heldout, ChatFormat(tokenizer), recipe)
    prompts: list[list[Message]] = [[{"role": "user", "content": pair.question}] for pair in heldout]
    predictions: dict[str, Predictions] = {}
    answers: dict[str, list[str]] = {}
    for name in EVALUATED:
        folder = folders.initial_huggingface if name == "initial" else folders.exported(name)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        ).eval()
        predictions[name] = predict(model, sequences, BATCH)
        if name in SHOWN:
            answers[name] = greedy_answers(model, tokenizer, prompts, recipe.max_new_tokens, BATCH)
        del model
        gc.collect()
    means = {name: token_means(predictions, name, recipe.beta) for name in SHOWN}
    return Outcome([pair.question for pair in heldout], means, answers)


def heldout_sequences(pairs: Sequence[Pair], chat: ChatFormat, recipe: Recipe) -> list[TokenSequence]:
    """The questions with their chosen answers, tokenized as the trainer does."""
    records = [
        Record(f"held-out:{number}", ({"role": "user", "content": pair.question},), (pair.chosen,))
        for number, pair in enumerate(pairs, start=1)
    ]
    rows = tokenize(records, chat, LengthPolicy(recipe.prompt_length, recipe.sequence_length, "drop", "truncate_right"))
    return [
        TokenSequence(np.asarray([*row.prompt, *row.responses[0]], dtype=np.int32), len(row.prompt))
        for row in rows
        if not row.dropped
    ]


def present(recipe: Recipe, folders: Folders, outcome: Outcome, stages: Stages) -> None:
    """Write the report and print its table and answers."""
    seconds = dict(zip(stages.expected, (stage.seconds for stage in stages.done), strict=True))
    rows = [
        ModelRow(
            model=name,
            heldout_reward=outcome.means[name].expected_reward,
            property_rate=property_rate(outcome.answers[name]),
            kl_to_initial=outcome.means[name].kl_to_initial,
            seconds=seconds.get(name),
        )
        for name in SHOWN
    ]
    result = QuickstartResult(
        model=recipe.model,
        property_rule=PROPERTY_RULE,
        heldout=f"{len(outcome.questions)} chosen answers on topics that training has not seen "
        f"({outcome.means['initial'].tokens} tokens)",
        rows=rows,
        examples=_examples(outcome),
        cross_checks=_cross_checks(folders, outcome),
        stages=stages.done,
        seconds=stages.seconds,
        notes=(
            "AlignDistil starts from the initial model. Its teachers are the DPO model and the reverse DPO model, "
            f"whose own training took {seconds['reverse_dpo']:.0f} s.",
        ),
        charts=_charts(folders),
    )
    write(result, folders.root)
    print(f"\n{results_table(rows)}\n\nAnswers to held-out questions:\n\n{examples_text(result.examples)}")
    print(f"\n{result.seconds:.0f} s; the whole report: {folders.root / REPORT_FILE}", flush=True)


def _examples(outcome: Outcome) -> list[Example]:
    """Questions of different topics, evenly spread, whatever their answers are like."""
    step = len(outcome.questions) // EXAMPLES
    chosen = range(0, step * EXAMPLES, step)
    return [Example(outcome.questions[i], {name: outcome.answers[name][i] for name in SHOWN}) for i in chosen]


def _cross_checks(folders: Folders, outcome: Outcome) -> list[CrossCheck]:
    """AlignDistil's validation before training is the initial model's, the one after it AlignDistil's own."""
    logged = validations(read_metrics(folders.metrics("aligndistil")))
    if not logged:
        return []
    return [
        CrossCheck(model, metric, float(record[metric]), float(getattr(outcome.means[model], metric)))
        for model, record in (("initial", logged[0]), ("aligndistil", logged[-1]))
        for metric in COMPARED
        if metric in record
    ]


def _charts(folders: Folders) -> dict[str, str]:
    """Title → file name of the charts for which the runs have logged figures."""
    drawn = {}
    for runs, metric, file, title in (
        (("dpo", "reverse_dpo"), "loss", "dpo_loss.svg", "Loss of DPO and reverse DPO"),
        (("aligndistil",), "expected_reward", "expected_reward.svg", "Expected reward a token during AlignDistil"),
    ):
        series = {run: training_curve(read_metrics(folders.metrics(run)), metric) for run in runs}
        present_series = {run: points for run, points in series.items() if points}
        if present_series:
            chart = line_chart(present_series, Axes(title, "step", metric.replace("_", " ")))
            (folders.root / file).write_text(chart, encoding="utf-8")
            drawn[title] = file
    return drawn
