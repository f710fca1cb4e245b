"""vLLM's engine where there is no vLLM: what it says when a server can't be had, and what it asks of one."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_aligndistil.config.rollout_schema import VLLMConfig
from megatron_aligndistil.errors import RolloutError
from megatron_aligndistil.rollout.engine import EngineLost, Request, Sampling
from megatron_aligndistil.rollout.vllm_engine import VLLMEngine
from megatron_aligndistil.rollout.vllm_server import find_interpreter, last_error

LIMIT = 32
SAMPLING = Sampling(max_new_tokens=3, temperature=0.5, top_p=0.9, top_k=7, stop_token_ids=(9,))
FITTING = {"vllm": "0", "dtype": "bfloat16", "logprobs_mode": "raw_logprobs", "generation_config": "vllm"}


def interpreter(folder: Path, program: str, probe: str = '{"version": "0", "cpu": true}') -> str:
    """A command that answers the probe like an interpreter with vLLM, and runs ``program`` in place of the server."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\nif [ \"$1\" = -c ]; then echo '{probe}'; exit 0; fi\n{program}\n")
    path.chmod(0o755)
    return str(path)


def engine(tmp_path: Path, **settings: Any) -> VLLMEngine:
    given = VLLMConfig(sync_dir=str(tmp_path), **settings)
    return VLLMEngine(given, tmp_path / "model", LIMIT, tmp_path / "log", generates=True)


def refusal(tmp_path: Path, **settings: Any) -> str:
    with pytest.raises(RolloutError) as caught:
        engine(tmp_path, **settings)
    message = str(caught.value)
    assert "\n" not in message
    assert not list(tmp_path.glob("aligndistil-vllm-*")), "the folder for weights was left"
    return message


class Stand(ThreadingHTTPServer):
    """A server that answers as vLLM does. ``asked`` holds what came; ``answers`` says what some paths get instead."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.answers: dict[str, tuple[int, Any]] = {}
        self.described = dict(FITTING, sleep_mode=False)
        self.loaded: dict[str, torch.Tensor] = {}
        self.missing: list[str] = []
        self.delay = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: Any) -> None:
        """Clients that hang up are part of a test."""

    def rpc(self, body: dict[str, Any]) -> dict[str, Any]:
        method = body["method"]
        if method == "aligndistil_load":
            self.loaded.update(load_file(body["kwargs"]["path"]))
        return {
            "aligndistil_describe": self.described,
            "aligndistil_end_update": {"missing": self.missing},
        }.get(method, {})

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        self.asked.append((path, body))
        if path in self.answers:
            return self.answers[path]
        if path == "/v1/models":
            return 200, {"data": [{"id": "m", "max_model_len": LIMIT}]}
        if path == "/collective_rpc":
            return 200, {"results": [self.rpc(body)]}
        if path == "/v1/completions":
            time.sleep(self.delay)
            tokens = [body["prompt"][0], 9][: body["max_tokens"]]
            given = [None, *({str(token): {"logprob": -float(token)}} for token in body["prompt"][1:])]
            logprobs = {"token_logprobs": [-0.25] * len(tokens)}
            choice = {"token_ids": tokens, "logprobs": logprobs, "prompt_logprobs": given, "finish_reason": "stop"}
            return 200, {"choices": [choice]}
        return 200, {}


class Handler(BaseHTTPRequestHandler):
    server: Stand

    def do_GET(self) -> None:
        self.reply({})

    def do_POST(self) -> None:
        self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def reply(self, body: dict[str, Any]) -> None:
        status, answer = self.server.answer(self.path, body)
        if status == 0:  # hang up
            return
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def stand() -> Iterator[Stand]:
    server = Stand()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def request(*prompt: int, seed: int = 5) -> Request:
    return Request(np.array(prompt, np.int32), seed)


def test_an_engine_that_does_not_generate_does_nothing(tmp_path):
    silent = VLLMEngine(VLLMConfig(python="/nowhere"), tmp_path, LIMIT, tmp_path, generates=False)
    assert not silent.generates
    assert silent.generate([], SAMPLING) == [] == silent.score([])
    silent.wake()
    silent.begin_update()
    silent.load({"a": torch.zeros(1)})
    silent.end_update()
    silent.sleep()
    silent.restart()
    silent.close()
    assert not list(tmp_path.iterdir())


def test_port_in_use(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = refusal(tmp_path, python=interpreter(tmp_path, "sleep 60"), port=port)
    assert message.startswith(f"model.rollout.vllm.port={port}: Address already in use")


@pytest.mark.parametrize(
    ("probe", "says"),
    [("{}", "this interpreter has no vLLM; build one by 'make vllm'"), ("no JSON", "Expecting value")],
)
def test_interpreter_without_vllm(tmp_path, probe, says):
    path = interpreter(tmp_path, "exit 1", probe)
    message = refusal(tmp_path, python=path)
    assert message.startswith(f"model.rollout.vllm.python={path}: ")
    assert says in message


def test_no_interpreter(tmp_path):
    assert "No such file or directory" in refusal(tmp_path, python=str(tmp_path / "none"))
    (tmp_path / "fails").write_text("#!/bin/sh\necho 'ImportError: no module' >&2\nexit 3\n")
    (tmp_path / "fails").chmod(0o755)
    assert "fails: ImportError: no module; build one" in refusal(tmp_path, python=str(tmp_path / "fails"))


def test_own_environment_is_the_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".venv-vllm" / "bin").mkdir(parents=True)
    path = interpreter(tmp_path / ".venv-vllm" / "bin", "exit 1")
    assert find_interpreter(VLLMConfig()).path == path
    assert not find_interpreter(VLLMConfig()).on_gpu
    assert find_interpreter(VLLMConfig(python=path)).path == path


def test_server_that_ends_at_once(tmp_path):
    says = "(EngineCore pid=7) ERROR 11-24 18:03:30 [core.py:133] ValueError: max_model_len is too long"
    program = f"echo '{says}'; echo 'RuntimeError: Engine core initialization failed. See above.'; exit 3"
    message = refusal(tmp_path, python=interpreter(tmp_path, program))
    assert "ended with code 3 before it was ready: ValueError: max_model_len is too long (log: " in message
    log = Path(message.rpartition("(log: ")[2].rstrip(")"))
    assert says in log.read_text()


def test_server_that_never_gets_ready(tmp_path):
    program = f"echo loading; echo $$ > {tmp_path}/pid; sleep 600 & wait"
    message = refusal(tmp_path, python=interpreter(tmp_path, program), start_timeout_seconds=1)
    assert "start_timeout_seconds=1: vLLM was not ready by then: loading (log: " in message
    group = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:  # init takes its time to collect what has ended
            os.killpg(group, 0)
            time.sleep(0.05)
        pytest.fail("what the server had started goes on")


def test_server_gets_no_variables_of_the_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    refusal(tmp_path, python=interpreter(tmp_path, f"env > {tmp_path}/env; ls $PYTHONPATH > {tmp_path}/path"))
    names = {line.partition("=")[0] for line in (tmp_path / "env").read_text().splitlines()}
    assert not names & {"RANK", "TORCHELASTIC_RUN_ID", "OMP_NUM_THREADS"}
    assert {"VLLM_SERVER_DEV_MODE", "HF_HUB_OFFLINE"} <= names
    assert (tmp_path / "path").read_text().split() == ["megatron_aligndistil"]


def test_sync_dir_that_is_none(tmp_path):
    settings = VLLMConfig(python=interpreter(tmp_path, "exit 1"), sync_dir=str(tmp_path / "none"))
    with pytest.raises(RolloutError, match=r"sync_dir=.*none: No such file"):
        VLLMEngine(settings, tmp_path, LIMIT, tmp_path, generates=True)


def test_unreachable_url(tmp_path):
    message = refusal(tmp_path, base_url="http://127.0.0.1:1", start_timeout_seconds=1)
    assert message.startswith("model.rollout.vllm.base_url=http://127.0.0.1:1: ")
    assert "Connection refused" in message
    assert "start it with: VLLM_SERVER_DEV_MODE=1 PYTHONPATH=" in message
    assert f"--max-model-len {LIMIT}" in message
    assert "not of the form http://host:port" in refusal(tmp_path, base_url="host:8000")


def test_url_of_a_server_that_does_not_fit(tmp_path, stand):
    stand.answers["/v1/models"] = (200, {"data": [{"id": "m", "max_model_len": LIMIT - 1}]})
    stand.described["logprobs_mode"] = "processed_logprobs"
    message = refusal(tmp_path, base_url=stand.url)
    assert f"its max_model_len is {LIMIT - 1}, not {LIMIT} or more; its logprobs_mode is processed" in message
    assert "--logprobs-mode raw_logprobs" in message
    stand.answers["/collective_rpc"] = (404, {"detail": "Not Found"})
    assert "it lacks the methods that load weights" in refusal(tmp_path, base_url=stand.url)
    stand.answers["/v1/models"] = (404, {"detail": "Not Found"})
    assert "it isn't the server that is needed" in refusal(tmp_path, base_url=stand.url)


def test_samples_and_scores(tmp_path, stand):
    used = engine(tmp_path, base_url=f"{stand.url}/v1/")
    first, second = used.generate([request(4, 5), request(6, seed=2**63 - 1)], SAMPLING)
    assert (first.tokens.tolist(), second.tokens.tolist()) == ([4, 9], [6, 9])
    assert (first.tokens.dtype, first.logprobs.dtype, first.finish_reason) == (np.int32, np.float32, "stop")
    bodies = {body["seed"]: body for path, body in stand.asked if path == "/v1/completions"}
    expected = {"max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "stop_token_ids": [9], "model": "m"}
    assert expected.items() <= bodies[2**63 - 1].items()
    scored, empty = used.score([np.array([4, 5, 6, 7], np.int32), np.array([3], np.int32)])
    np.testing.assert_array_equal(scored, np.array([-5, -6, -0.25], np.float32))
    assert empty.shape == (0,)
    used.close()


def test_room(tmp_path, stand):
    used = engine(tmp_path, base_url=stand.url)
    used.generate([request(*range(LIMIT - 1))], SAMPLING)
    assert stand.asked[-1][1]["max_tokens"] == 1
    with pytest.raises(RolloutError, match=f"a prompt of {LIMIT} tokens leaves no room .* {LIMIT}; drop such prompts"):
        used.generate([request(1), request(*range(LIMIT))], SAMPLING)
    with pytest.raises(RolloutError, match=f"a sequence of {LIMIT + 1} tokens is longer"):
        used.score([np.zeros(LIMIT + 1, np.int32)])


def test_weights_come_in_the_engines_type_and_leave_no_file(tmp_path, stand):
    used = engine(tmp_path, base_url=stand.url)
    used.begin_update()
    used.load({"a": torch.arange(6, dtype=torch.float64).view(2, 3).t(), "b": torch.ones(2, requires_grad=True)})
    used.load({})
    used.load({"c": torch.zeros(1, dtype=torch.float16)})
    used.end_update()
    assert {name: tensor.dtype for name, tensor in stand.loaded.items()} == dict.fromkeys("abc", torch.bfloat16)
    assert stand.loaded["a"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert not list(tmp_path.glob("aligndistil-vllm-*/*"))
    assert stand.asked[-1][0] == "/reset_prefix_cache"
    stand.missing = ["model.norm.weight"]
    with pytest.raises(RolloutError, match=r"no weights for 1 parameters: model\.norm\.weight"):
        used.end_update()
    stand.answers["/collective_rpc"] = (200, {"results": [{}, {"error": "FileNotFoundError:\n bucket"}]})
    with pytest.raises(RolloutError, match="aligndistil_begin_update failed: FileNotFoundError: bucket"):
        used.begin_update()
    used.close()
    assert not list(tmp_path.glob("aligndistil-vllm-*"))


def test_sleeps_only_where_the_server_can(tmp_path, stand):
    awake = engine(tmp_path, base_url=stand.url)
    awake.sleep()
    stand.described["sleep_mode"] = True
    engine(tmp_path, base_url=stand.url, sleep=False).sleep()
    assert not [path for path, _ in stand.asked if "sleep" in path]
    sleeper = engine(tmp_path, base_url=stand.url)
    sleeper.wake()
    sleeper.sleep()
    sleeper.wake()
    assert [path for path, _ in stand.asked][-2:] == ["/sleep?level=1", "/wake_up"]


def test_lost_and_found_again(tmp_path, stand):
    used = engine(tmp_path, base_url=stand.url, max_restarts=2, request_timeout_seconds=1)
    for answer, says in [((0, None), "RemoteDisconnected"), ((500, {"error": {"message": "EngineCore died"}}), "died")]:
        stand.answers["/v1/completions"] = answer
        with pytest.raises(EngineLost, match=says):
            used.generate([request(1), request(2)], SAMPLING)
        del stand.answers["/v1/completions"]
        used.restart()
        assert len(used.generate([request(1)], SAMPLING)) == 1
    stand.delay = 1.5
    with pytest.raises(EngineLost, match="no answer in time"):
        used.score([np.array([1, 2], np.int32)])
    with pytest.raises(RolloutError, match=r"max_restarts=2: vLLM was lost once more: .* no answer in time"):
        used.restart()


def test_what_the_server_refuses_is_the_users_error(tmp_path, stand):
    used = engine(tmp_path, base_url=stand.url)
    stand.answers["/v1/completions"] = (400, {"error": {"message": "token id 99\nis out of vocabulary"}})
    with pytest.raises(RolloutError, match="status 400: token id 99 is out of vocabulary"):
        used.generate([request(1)], SAMPLING)


def test_last_error():
    assert last_error("") == ""
    assert last_error("one\n\ntwo\n") == "two"
    refused = "api_server.py: error: unrecognized arguments: --x"
    assert last_error(refused) == refused
    pydantic = "pydantic_core.ValidationError: 1 validation error for ModelConfig\n  Value error, too long\n    more"
    assert last_error(pydantic).endswith("ModelConfig Value error, too long")


def test_worker_and_keeper_import_nothing_of_the_package():
    from megatron_aligndistil.rollout import vllm_keeper, vllm_worker

    for module in (vllm_keeper, vllm_worker):
        assert "megatron_aligndistil" not in {line.split()[1] for line in _imports(Path(module.__file__))}
    assert sys.modules.get("vllm") is None


def _imports(path: Path) -> list[str]:
    lines = [line.strip().replace(".", " ") for line in path.read_text().splitlines()]
    return [line for line in lines if line.startswith(("import ", "from "))]
