"""vLLM as an engine: token ids in, token ids and log-probs out, weights through files in memory."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_aligndistil.config.rollout_schema import VLLMConfig
from megatron_aligndistil.errors import RolloutError
from megatron_aligndistil.rollout.engine import EngineLost, Request, Sampling
from megatron_aligndistil.rollout.vllm_client import Client, Refused, one_line
from megatron_aligndistil.rollout.vllm_server import KEY, RemoteServer, Server, StartedServer
from megatron_aligndistil.types import Sample

logger = logging.getLogger(__name__)

# As many as vLLM takes into a batch by itself: more would only wait there, each with its time limit running.
CONCURRENT_REQUESTS = 256
# vLLM would fill what a request leaves open from its own defaults.
NEUTRAL = {
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "skip_special_tokens": False,
    "return_tokens_as_token_ids": True,
    "return_token_ids": True,
    "logprobs": 0,  # of the sampled token alone
}

_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")


class VLLMEngine:
    """An ``Engine`` that speaks to a vLLM server over HTTP: one that it starts on this node, or ``base_url``'s.

    Only a rank that ``generates`` has a server; the others' calls do nothing. The server starts in the constructor with
    the weights of ``model``, a Hugging Face folder, and serves ``max_model_len`` tokens of prompt and response.

    On a GPU the server sleeps while the policy trains, where ``settings.sleep`` says so: at vLLM's level 1, whose
    weights wait in host memory, because not every rollout is preceded by new ones.

    Raises:
        RolloutError: the server can't be started, or one elsewhere can't be reached or doesn't fit.
    """

    def __init__(self, settings: VLLMConfig, model: Path, max_model_len: int, log_dir: Path, generates: bool) -> None:
        self._settings, self._max_model_len = settings, max_model_len
        self._generates = generates
        self._restarts = 0
        self._asleep = False
        self._loss = ""  # the last one's reason
        self._server: Server
        if not generates:
            return
        if settings.base_url is not None:
            self._server = RemoteServer(settings, settings.base_url, model, max_model_len)
        else:
            self._server = StartedServer(settings, model, max_model_len, log_dir)
        self._start()

    @property
    def generates(self) -> bool:
        """Whether this rank's engine draws responses."""
        return self._generates

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Sample]:
        """One response a request, in order. A model's own end token ends one even if it isn't among the stop tokens.

        Raises:
            EngineLost: the server ended or doesn't answer.
            RolloutError: a prompt leaves no room for a response.
        """
        if not self._generates:
            return []
        for request in requests:
            if len(request.prompt) >= self._max_model_len:
                raise RolloutError(
                    f"a prompt of {len(request.prompt)} tokens leaves no room for a response in the engine's "
                    f"{self._max_model_len}; drop such prompts or raise model.encoder_seq_length"
                )
        return self._each(lambda request: self._draw(request, sampling), requests)

    def score(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-probs, nats, of the tokens 1, 2, … of each sequence int32 [S]: float32 [S - 1].

        Raises:
            EngineLost: the server ended or doesn't answer.
            RolloutError: a sequence is longer than the engine's limit.
        """
        if not self._generates:
            return []
        for sequence in sequences:
            if len(sequence) > self._max_model_len:
                raise RolloutError(
                    f"a sequence of {len(sequence)} tokens is longer than the engine's limit, {self._max_model_len}; "
                    "raise model.encoder_seq_length"
                )
        return self._each(self._score, sequences)

    def begin_update(self) -> None:
        """New weights follow."""
        if self._generates:
            self._call("aligndistil_begin_update")

    def load(self, bucket: Mapping[str, Tensor]) -> None:
        """Some of them, whole tensors of any float type, on any device, under Hugging Face names.

        Raises:
            EngineLost: the server ended or doesn't answer.
            RolloutError: the folder has no room for them, or the server can't read them.
        """
        if not self._generates or not bucket:
            return
        tensors = {name: tensor.detach().to("cpu", self._dtype).contiguous() for name, tensor in bucket.items()}
        size = sum(tensor.nbytes for tensor in tensors.values())
        folder = self._server.folder
        path = folder / "bucket.safetensors"
        try:
            # Pages beyond a memory file system's limit kill the writer instead of failing the write.
            if shutil.disk_usage(folder).free < size:
                raise RolloutError(
                    f"{KEY}.sync_dir={folder.parent}: a bucket of weights takes {size >> 20} MiB, which aren't free; "
                    "give another folder, or a smaller model.rollout.sync_bucket_mib"
                )
            save_file(tensors, path)
            del tensors
            self._call("aligndistil_load", path=str(path))
        except OSError as error:
            # A server that ended takes its folder along.
            raise self._lost(EngineLost(f"weights can't be handed over in {folder}: {error}")) from None
        finally:
            path.unlink(missing_ok=True)

    def end_update(self) -> None:
        """All weights were given.

        Raises:
            EngineLost: the server ended or doesn't answer.
            RolloutError: some of the model's parameters were not among them.
        """
        if not self._generates:
            return
        missing = self._call("aligndistil_end_update")[0]["missing"]
        if missing:
            raise RolloutError(f"vLLM got no weights for {len(missing)} parameters: {one_line(', '.join(missing))}")
        self._post("/reset_prefix_cache")  # of a server elsewhere; ours keeps none

    def sleep(self) -> None:
        """Leave the GPU's memory to training."""
        if self._generates and self._sleeps and not self._asleep:
            self._post("/sleep?level=1")
            self._asleep = True

    def wake(self) -> None:
        """Take it back."""
        if self._generates and self._asleep:
            self._post("/wake_up")
            self._asleep = False

    def restart(self) -> None:
        """Start again after ``EngineLost``; a server elsewhere is waited for. All weights must follow.

        Raises:
            RolloutError: it doesn't start, or has been lost more than ``max_restarts`` times.
        """
        if not self._generates:
            return
        if self._restarts >= self._settings.max_restarts:
            raise RolloutError(
                f"{KEY}.max_restarts={self._settings.max_restarts}: vLLM was lost once more: {self._loss}; "
                f"{self._server.advice()}"
            )
        self._restarts += 1
        self._server.stop()
        self._start()

    def close(self) -> None:
        """End the server that was started, and whatever it has started."""
        if self._generates:
            self._server.stop()

    def _start(self) -> None:
        self._server.start()
        self._asleep = False
        self._client = Client(self._server.url, self._settings.request_timeout_seconds)
        try:
            self._check_fit()
        except BaseException:
            self._server.stop()
            raise

    def _check_fit(self) -> None:
        """See whether the server serves what the trainer needs, and what it calls its model."""
        problems = []
        try:
            listed = self._client.get("/v1/models")["data"][0]
            self._model = listed["id"]
            limit = listed.get("max_model_len") or 0
            if limit < self._max_model_len:
                problems.append(f"its max_model_len is {limit}, not {self._max_model_len} or more")
            problems += self._check_extension()
        except (EngineLost, Refused, KeyError, IndexError, TypeError) as error:
            problems.append(f"it isn't the server that is needed ({one_line(str(error))})")
        if not problems:
            return
        where = f"{KEY}.base_url={self._server.url}" if isinstance(self._server, RemoteServer) else self._server.url
        remedy = (
            f"start it with: {self._server.command()}"
            if isinstance(self._server, RemoteServer)
            else f"is {KEY}.extra_args={self._settings.extra_args} to blame? {self._server.advice()}"
        )
        raise RolloutError(f"{where}: {'; '.join(problems)}; {remedy}")

    def _check_extension(self) -> list[str]:
        try:
            described = self._client.call("aligndistil_describe")[0]
        except (EngineLost, Refused) as error:
            return [f"it lacks the methods that load weights ({error})"]
        self._dtype: torch.dtype = getattr(torch, described["dtype"])
        self._sleeps = bool(self._settings.sleep and described["sleep_mode"])
        wanted = {"logprobs_mode": "raw_logprobs", "generation_config": "vllm"}
        return [
            f"its {key} is {described[key]}, not {value}" for key, value in wanted.items() if described[key] != value
        ]

    def _draw(self, request: Request, sampling: Sampling) -> Sample:
        room = self._max_model_len - len(request.prompt)
        choice = self._complete(
            prompt=request.prompt.tolist(),
            seed=request.seed,
            max_tokens=min(sampling.max_new_tokens, room),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            stop_token_ids=list(sampling.stop_token_ids),
        )
        reason: Literal["stop", "length"] = choice["finish_reason"]
        if reason not in ("stop", "length"):
            raise EngineLost(f"vLLM ended a response because of {reason!r}")
        return Sample(np.asarray(choice["token_ids"], np.int32), _logprobs_of(choice), reason)

    def _score(self, sequence: np.ndarray) -> np.ndarray:
        if len(sequence) < 2:
            return np.zeros(0, np.float32)
        *prompt, last = sequence.tolist()
        # The last token is drawn, from itself alone: as part of the prompt it would need one position more.
        choice = self._complete(
            prompt=prompt, max_tokens=1, temperature=0.0, allowed_token_ids=[last], prompt_logprobs=0
        )
        pairs = zip(prompt[1:], choice["prompt_logprobs"][1:], strict=True)
        values = [position[str(token)]["logprob"] for token, position in pairs]
        return np.concatenate([np.asarray(values, np.float32), _logprobs_of(choice)])

    def _complete(self, **wanted: Any) -> dict[str, Any]:
        choice: dict[str, Any] = self._client.post("/v1/completions", {"model": self._model, **NEUTRAL, **wanted})[
            "choices"
        ][0]
        return choice

    def _each(self, ask: Callable[[_Item], _Answer], items: Sequence[_Item]) -> list[_Answer]:
        """``ask`` of every item, in order, many at once; vLLM makes batches of them."""
        if not items:
            return []
        pool = ThreadPoolExecutor(min(len(items), CONCURRENT_REQUESTS), thread_name_prefix="vllm")
        try:
            return list(pool.map(ask, items))
        except EngineLost as error:
            raise self._lost(error) from None
        finally:
            pool.shutdown(cancel_futures=True)

    def _call(self, method: str, **arguments: str) -> list[dict[str, Any]]:
        try:
            return self._client.call(method, **arguments)
        except EngineLost as error:
            raise self._lost(error) from None

    def _post(self, path: str) -> None:
        try:
            self._client.post(path)
        except EngineLost as error:
            raise self._lost(error) from None

    def _lost(self, error: EngineLost) -> EngineLost:
        self._loss = str(error)
        return error


def _logprobs_of(choice: Mapping[str, Any]) -> np.ndarray:
    return np.asarray(choice["logprobs"]["token_logprobs"], np.float32)
