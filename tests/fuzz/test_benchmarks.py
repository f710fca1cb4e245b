"""Benchmarks' files, ready answers and judges' replies: read, or one line that names the file; replies are skipped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from megatron_aligndistil.config.evaluation_schema import (
    AlpacaEvalConfig,
    AlpacaEvalEvaluationConfig,
    ArenaHardConfig,
    ArenaHardEvaluationConfig,
    MTBenchConfig,
    MTBenchEvaluationConfig,
)
from megatron_aligndistil.evaluation.content_cache import ContentCache
from megatron_aligndistil.evaluation.judge import ChatRequest, Endpoint, Judge
from megatron_aligndistil.launch import evaluate_alpaca_eval, evaluate_arena_hard, evaluate_mt_bench
from megatron_aligndistil.launch.evaluate_pairwise import read_ready
from tests.fuzz.mutations import spoiled_bytes, spoiled_json
from tests.fuzz.reader import Reader
from tests.integration.benchmark_folders import write_alpaca_eval, write_arena_hard, write_mt_bench
from tests.unit.evaluation.judge_server import JudgeServer, Response, completion, serving


def test_benchmark_folders(record, tmp_path: Path) -> None:
    """One file of a folder spoiled, as bytes or one row of it as a value."""
    reader = Reader("benchmark folders")
    mt, arena, alpaca = (tmp_path / name for name in ("mt", "arena", "alpaca"))
    write_mt_bench(mt), write_arena_hard(arena), write_alpaca_eval(alpaca)
    prepare: dict[Path, Callable[[], Any]] = {
        mt: lambda: evaluate_mt_bench.prepare(
            MTBenchEvaluationConfig(output="o", benchmark=MTBenchConfig(folder=str(mt)))
        ),
        arena: lambda: evaluate_arena_hard.prepare(
            ArenaHardEvaluationConfig(output="o", benchmark=ArenaHardConfig(folder=str(arena)))
        ),
        alpaca: lambda: evaluate_alpaca_eval.prepare(
            AlpacaEvalEvaluationConfig(output="o", benchmark=AlpacaEvalConfig(folder=str(alpaca)))
        ),
    }
    sound = {path: path.read_bytes() for folder in prepare for path in folder.rglob("*") if path.is_file()}
    inputs = st.sampled_from(sorted(sound)).flatmap(
        lambda path: st.tuples(st.just(path), spoiled_bytes([sound[path]]) | _row_spoiled(sound[path]))
    )

    def check(drawn: tuple[Path, bytes]) -> None:
        path, content = drawn
        folder = next(own for own in prepare if own in path.parents)
        path.write_bytes(content)
        try:
            reader.read(prepare[folder], folder)
        finally:
            path.write_bytes(sound[path])

    record(reader.fuzz(inputs, check))


def _row_spoiled(content: bytes) -> st.SearchStrategy[bytes]:
    """One of the first lines, where they are JSON."""
    lines = content.split(b"\n")
    if not lines[0].startswith(b"{"):
        return st.just(content + b"\x00")
    spoiled = spoiled_json([json.loads(lines[0])]).map(lambda text: text.encode("utf-8", "surrogatepass"))
    return spoiled.map(lambda line: b"\n".join([line, *lines[1:]]))


def test_ready_answers(record, tmp_path: Path) -> None:
    reader, file = Reader("ready answers"), tmp_path / "ready.jsonl"
    rows = [{"prompt": f"p {i}", "answer": f"a {i}"} for i in range(3)]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()

    def check(content: bytes) -> None:
        file.write_bytes(content)
        reader.read(lambda: read_ready("outputs.x", file, [row["prompt"] for row in rows]), file)

    record(reader.fuzz(spoiled_bytes([text]) | _row_spoiled(text), check))


def test_judges_replies(record, tmp_path: Path) -> None:
    """Over HTTP: a body that is none is one line, since it is the only one."""
    reader = Reader("judges' replies")
    sound = completion("[[A]]", logprobs={"content": [{"token": "m", "logprob": -0.1, "top_logprobs": []}]})
    bodies = spoiled_json([json.loads(sound)]) | spoiled_bytes([sound.encode()]).map(lambda own: own.decode("latin-1"))

    def ask(server: JudgeServer, number: int) -> str:
        judge = Judge(Endpoint(server.url, "tiny", attempts=1), ContentCache(tmp_path))
        (reply,) = judge.ask([ChatRequest(({"role": "user", "content": str(number)},), 8)])
        assert reply is not None
        return reply.text

    with serving(lambda body: "") as server:
        numbers = iter(range(1 << 30))

        def check(body: str) -> None:
            server.answer = lambda _: Response(body.encode("utf-8", "replace").decode())
            reader.read(lambda: ask(server, next(numbers)), "judge.base_url")

        record(reader.fuzz(bodies, check))
