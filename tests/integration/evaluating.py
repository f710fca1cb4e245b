"""What follows ``aligndistil evaluate`` in tests, and a judge that counts vowels."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from megatron_aligndistil.evaluation.content_cache import FILE
from tests.integration.analysis_setting import Setting
from tests.integration.program import run
from tests.unit.evaluation.judge_server import JudgeServer

SHORT = "sampling.max_new_tokens=6"


def vowels(text: str) -> int:
    return sum(letter in "aeiou" for letter in text)


def more_vowels(body: dict[str, Any]) -> str:
    """The answer with more vowels, or what can't be read."""
    _, first, second = body["messages"][0]["content"].split("<>")
    more = vowels(first) - vowels(second)
    return "[[A]]" if more > 0 else "[[B]]" if more < 0 else "hm"


def arguments(setting: Setting, benchmark: str, output: str, *overrides: str) -> list[str]:
    """What follows ``evaluate``."""
    (setting.folder / "prompt.txt").write_text("{question}<>{answer_a}<>{answer_b}")
    return [
        *setting.passes(benchmark, output, SHORT),
        f"cache_dir={setting.folder / 'answers'}",
        *overrides,
    ]


def pairwise(setting: Setting, server: JudgeServer, output: str, *overrides: str) -> list[str]:
    return arguments(
        setting,
        "pairwise",
        output,
        f"+models.sft={setting.models['model']}",
        f"+models.aligned={setting.models['dpo']}",
        f"benchmark.prompts=[{setting.test}]",
        f"benchmark.judge_prompt={setting.folder / 'prompt.txt'}",
        "reward.source=model",
        f"reward.path={setting.models['reward']}",
        f"judge.base_url={server.url}",
        "judge.model=tiny",
        *overrides,
    )


def text_of(setting: Setting, output: str) -> str:
    """The Markdown report."""
    (report,) = (setting.folder / output).glob("*.md")
    return report.read_text()


def evaluate(*argv: str) -> None:
    finished = run("evaluate", *argv)
    assert finished.exit_code == 0, finished.errors


def kept_in(cache: Path) -> int:
    """How many values a cache has, as another process sees it."""
    if not (cache / FILE).exists():
        return 0
    with closing(sqlite3.connect(cache / FILE, timeout=60)) as connection:
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        return int(connection.execute("SELECT count(*) FROM made").fetchone()[0]) if tables else 0
