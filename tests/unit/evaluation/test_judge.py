"""The judge against a small HTTP server that answers as it is told."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_aligndistil.errors import ConfigError, DataError
from megatron_aligndistil.evaluation.content_cache import ContentCache
from megatron_aligndistil.evaluation.judge import ChatRequest, Endpoint, Judge
from megatron_aligndistil.evaluation.request_threads import GRACE_SECONDS, Stopped
from megatron_aligndistil.parallel.ports import free_port
from tests.unit.evaluation.judge_server import JudgeServer, Response, completion, serving


def request(text: str, **how: Any) -> ChatRequest:
    return ChatRequest(({"role": "user", "content": text},), 16, **how)


REQUESTS = [request(f"question {i}") for i in range(12)]


@pytest.fixture
def cache(tmp_path: Path) -> ContentCache:
    return ContentCache(tmp_path / "cache")


def judge_at(server: JudgeServer | str, cache: ContentCache, **settings: Any) -> Judge:
    url = server if isinstance(server, str) else server.url
    return Judge(Endpoint(url, "tiny", attempts=settings.pop("attempts", 3), **settings), cache)


def echo(body: dict[str, Any]) -> str:
    return body["messages"][0]["content"][::-1]


def texts(replies: list[Any]) -> list[str | None]:
    return [None if reply is None else reply.text for reply in replies]


def test_replies_come_in_order_and_carry_what_was_asked(cache: ContentCache) -> None:
    with serving(echo) as server:
        judge = judge_at(server, cache, api_key="secret", extra_body={"seed": 3})
        judge.check()
        replies = judge.ask([*REQUESTS, request("scores", top_logprobs=5, temperature=1.0)])
    assert texts(replies) == [f"question {i}"[::-1] for i in range(12)] + ["scores"[::-1]]
    assert {headers["authorization"] for headers in server.headers} == {"Bearer secret"}
    plain, scored = (next(body for body in server.asked if word in str(body)) for word in ("question", "scores"))
    assert (plain["model"], plain["temperature"], plain["max_tokens"], plain["seed"]) == ("tiny", 0.0, 16, 3)
    assert "logprobs" not in plain and (scored["logprobs"], scored["top_logprobs"]) == (True, 5)
    usage = judge.usage
    assert (usage.answered, usage.prompt_tokens, usage.completion_tokens) == (13, 13 * 7, 13 * 2)


def test_nothing_is_asked_twice(cache: ContentCache, tmp_path: Path) -> None:
    with serving(echo) as server:
        first = judge_at(server, cache).ask([*REQUESTS, *REQUESTS[:3]])
        assert len(server.asked) == 12  # what is there twice is asked once
        again = judge_at(server, ContentCache(tmp_path / "cache"))
        assert again.ask(REQUESTS) == first[:12] and again.usage.cached == 12
        assert len(server.asked) == 12
        for other in (replace(REQUESTS[0], max_tokens=17), replace(REQUESTS[0], temperature=0.5)):
            again.ask([other])
        judge_at(server, cache, extra_body={"seed": 1}).ask(REQUESTS[:1])
        assert len(server.asked) == 15  # other questions are other questions


def test_an_interruption_loses_no_reply(cache: ContentCache) -> None:
    gone = threading.Event()

    def answer(body: dict[str, Any]) -> Response | str:
        if len(server.asked) > 6:
            gone.set()
        return Response("{}", 401) if gone.is_set() else echo(body)

    with serving(answer) as server:
        with pytest.raises(DataError, match=r"judge.base_url=.*status 401.*the same command goes on"):
            judge_at(server, cache, concurrency=2).ask(REQUESTS)
        before = Counter(server.prompts)
        server.answer = echo
        server.asked.clear()
        assert texts(judge_at(server, cache).ask(REQUESTS)) == [f"question {i}"[::-1] for i in range(12)]
    answered = 12 - len(server.asked)
    assert answered >= 5 and max(before.values()) == 1
    assert len(set(server.prompts)) == len(server.prompts)


def test_a_busy_or_failing_endpoint_is_asked_again(cache: ContentCache) -> None:
    tries: Counter[str] = Counter()

    def answer(body: dict[str, Any]) -> Response | str:
        text = body["messages"][0]["content"]
        tries[text] += 1
        if tries[text] == 1:
            status = 429 if text.endswith(("0", "2")) else 500
            return Response("{}", status, {"Retry-After": "0.01"})
        return echo(body)

    with serving(answer) as server:
        judge = judge_at(server, cache)
        assert None not in judge.ask(REQUESTS[:4])
    assert judge.usage.retries == 4 and set(tries.values()) == {2}


def test_an_endpoint_that_only_fails_is_one_line(cache: ContentCache) -> None:
    with (
        serving(lambda body: Response("down", 503, {"Retry-After": "0.01"})) as server,
        pytest.raises(DataError, match=r"judge.base_url=.*status 503.*judge.model=tiny") as caught,
    ):
        judge_at(server, cache).ask(REQUESTS[:1])
    assert "\n" not in str(caught.value) and len(server.asked) == 3


def test_an_endpoint_where_nobody_is(cache: ContentCache) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    for ask in (Judge.check, lambda judge: judge.ask(REQUESTS[:1])):
        with pytest.raises(DataError, match=r"judge.base_url=http.*: no answer \(.*refused.*\)"):
            ask(judge_at(url, cache, attempts=1))


def test_requests_that_are_refused_alone_are_skipped_and_counted(cache: ContentCache) -> None:
    """One is too long for the judge, one gets no chat completion, one an empty text: the others count."""

    def answer(body: dict[str, Any]) -> Response | str:
        text = body["messages"][0]["content"]
        if text == "question 3":
            return Response('{"error": {"message": "too long"}}', 400)
        if text == "question 5":
            return Response("<html>proxy</html>")
        return Response(completion(None)) if text == "question 7" else echo(body)

    with serving(answer) as server:
        judge = judge_at(server, cache)
        replies = judge.ask(REQUESTS)
        assert [i for i, reply in enumerate(replies) if reply is None] == [3, 5]
        assert replies[7] is not None and replies[7].text == ""
        assert (judge.usage.skipped, judge.usage.answered) == (2, 10)
        judge.ask(REQUESTS)
        assert server.prompts.count("question 3") == 2  # what was skipped isn't taken for answered
        assert server.prompts.count("question 7") == 1


@pytest.mark.parametrize("said", [Response("<html>", 200), Response('{"choices": []}'), Response("{}", 422)])
def test_an_endpoint_that_skips_all_is_one_line(cache: ContentCache, said: Response) -> None:
    with serving(lambda body: said) as server:
        for requests in (REQUESTS, REQUESTS[:2]):
            with pytest.raises(DataError, match=r"judge.base_url="):
                judge_at(server, cache, concurrency=1).ask(requests)
    assert len(server.asked) - 2 in (5, 6)  # one may be under way when the fifth is back


def test_refusals_do_not_outrun_the_good_requests_under_way(cache: ContentCache) -> None:
    refused = {f"question {i}" for i in range(5)}
    all_refused = threading.Event()

    def answer(body: dict[str, Any]) -> Response | str:
        text = body["messages"][0]["content"]
        if text in refused:
            return Response('{"error": {"message": "too long"}}', 400)
        assert all_refused.wait(20)
        return echo(body)

    with serving(answer) as server:
        judge = judge_at(server, cache, concurrency=8)
        threading.Timer(1.0, all_refused.set).start()
        replies = judge.ask(REQUESTS)
    assert [i for i, reply in enumerate(replies) if reply is None] == [0, 1, 2, 3, 4]
    assert (judge.usage.skipped, judge.usage.answered) == (5, 7)


def test_half_a_surrogate_pair_is_replaced(cache: ContentCache) -> None:
    with serving(lambda body: "[[A]] \ud83d") as server:
        judge = judge_at(server, cache)
        assert texts(judge.ask(REQUESTS[:1])) == ["[[A]] ?"] == texts(judge.ask(REQUESTS[:1]))


def test_a_model_that_is_not_served(cache: ContentCache) -> None:
    with serving(echo, model="other") as server, pytest.raises(DataError, match=r"judge.model=tiny: .* serves other"):
        judge_at(server, cache).check()


def test_an_address_without_its_path(cache: ContentCache) -> None:
    with serving(echo) as server, pytest.raises(DataError, match=r"base_url=http://\S+: no chat completions there"):
        judge_at(server.url.removesuffix("/v1"), cache).check()


BAD_URLS = [
    "judge:8000/v1",
    "ftp://judge/v1",
    "http://",
    "http://[bad",
    "http://judge:abc/v1",
    "http://\xe4\xf6.\u2603/v1",
]


@pytest.mark.parametrize("url", BAD_URLS)
def test_an_address_that_is_none(url: str, cache: ContentCache) -> None:
    with pytest.raises(ConfigError, match=r"^judge\.base_url="):
        judge_at(url, cache).check()


def test_a_key_that_no_header_holds() -> None:
    with pytest.raises(ConfigError, match=r"^judge\.api_key_variable: "):
        Endpoint("http://judge/v1", "m", "schl\xfcssel")


def stopped(judge: Judge) -> None:
    """Told to stop while it asks."""
    threading.Timer(0.5, judge.stop.set).start()
    with pytest.raises(Stopped):
        judge.ask(REQUESTS)


def test_a_judge_that_hangs_is_left_when_told_to_stop(cache: ContentCache) -> None:
    over = threading.Event()

    def answer(body: dict[str, Any]) -> str:
        over.wait(60)
        return echo(body)

    with serving(answer) as server:
        begun = time.monotonic()
        stopped(judge_at(server, cache, concurrency=2))
        assert time.monotonic() - begun < GRACE_SECONDS + 3 and len(server.asked) == 2
        over.set()


def test_what_is_under_way_is_kept_when_told_to_stop(cache: ContentCache) -> None:
    def answer(body: dict[str, Any]) -> str:
        time.sleep(1.0)
        return echo(body)

    with serving(answer) as server:
        stopped(judge_at(server, cache, concurrency=2))
        again = judge_at(server, cache)
        again.ask(REQUESTS)
        assert again.usage.cached == 2 and max(Counter(server.prompts).values()) == 1
