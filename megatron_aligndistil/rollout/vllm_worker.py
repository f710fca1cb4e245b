"""What vLLM's own processes load of us: the methods by which a running engine takes new weights.

vLLM's interpreter is usually another than the trainer's, so this module imports nothing else of the package, and vLLM
only inside its methods. ``--worker-extension-cls`` names the class; vLLM makes its worker a subclass of it, and calls
the methods by ``POST /collective_rpc``, which exists where ``VLLM_SERVER_DEV_MODE=1``.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

POLL_SECONDS = 1.0
GRACE_SECONDS = 5.0

Answer = dict[str, Any]


def _end_with_the_server() -> None:
    """End this server's processes when the first of them has ended and nobody else is left to clean up.

    They are a process group that is named after the first. vLLM's engine wouldn't notice, and would keep its memory.
    """
    group = os.getpgrp()
    while True:
        try:
            os.kill(group, 0)
        except ProcessLookupError:
            os.killpg(group, signal.SIGTERM)  # first, so that they give shared memory back
            time.sleep(GRACE_SECONDS)
            os.killpg(group, signal.SIGKILL)
        time.sleep(POLL_SECONDS)


if os.environ.get("ALIGNDISTIL_STARTED") == "1":  # by the trainer: others may run theirs in groups of any kind
    threading.Thread(target=_end_with_the_server, daemon=True).start()


class WeightUpdates:
    """Mixed into vLLM's worker. Every method answers with a dict; ``error`` in it says what went wrong.

    An update is ``begin``, any number of ``load``, ``end``. Weights go straight into the layers as they come: vLLM
    holds back only those of layers that aren't complete yet. Between ``begin`` and ``end`` nothing can be generated.
    """

    vllm_config: Any
    model_runner: Any

    def aligndistil_describe(self) -> Answer:
        """What the engine was started with, for the trainer to check."""
        import vllm

        model = self.vllm_config.model_config
        return {
            "vllm": vllm.__version__,
            "dtype": str(model.dtype).removeprefix("torch."),
            "logprobs_mode": str(model.logprobs_mode),
            "generation_config": str(model.generation_config),
            "sleep_mode": bool(model.enable_sleep_mode),
        }

    def aligndistil_begin_update(self) -> Answer:
        """Take the layers' tensors back to the shapes that a model folder has; one that was cut off starts anew."""
        return _answer(self.vllm_config, self._aligndistil_begin)

    def aligndistil_load(self, path: str) -> Answer:
        """Load the tensors of the safetensors file ``path``, under Hugging Face names."""
        return _answer(self.vllm_config, lambda: self._aligndistil_load(path))

    def aligndistil_end_update(self) -> Answer:
        """Finish the layers for vLLM's kernels; ``missing`` names the parameters that no ``load`` has given."""
        return _answer(self.vllm_config, self._aligndistil_end)

    def _aligndistil_begin(self) -> Answer:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        if getattr(self, "_aligndistil_expected", None) is not None:
            self._aligndistil_finish()
        model = self.model_runner.get_model()
        self._aligndistil_expected: set[str] | None = {name for name, _ in model.named_parameters()}
        initialize_layerwise_reload(model)
        return {}

    def _aligndistil_load(self, path: str) -> Answer:
        if getattr(self, "_aligndistil_expected", None) is None:
            raise RuntimeError("weights came outside of an update")
        assert self._aligndistil_expected is not None
        self._aligndistil_expected -= self.model_runner.get_model().load_weights(_tensors(path))
        return {}

    def _aligndistil_end(self) -> Answer:
        missing = sorted(self._aligndistil_expected or ())
        self._aligndistil_finish()
        return {"missing": missing}

    def _aligndistil_finish(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        model = self.model_runner.get_model()
        finalize_layerwise_reload(model, self.vllm_config.model_config)
        _repack_tied_heads(model)
        self._aligndistil_expected = None


def _answer(vllm_config: Any, act: Callable[[], Answer]) -> Answer:
    """What ``act`` returns, or its error as text: vLLM would answer an exception with no more than a status of 500."""
    from vllm.config import set_current_vllm_config

    try:
        # Layers read vLLM's configuration from there while they lay out their weights.
        with torch.no_grad(), set_current_vllm_config(vllm_config):
            return act()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _repack_tied_heads(model: torch.nn.Module) -> None:
    """On a CPU, vLLM's linear layers compute with a packed copy of their weight.

    Its reload packs the layers again that weights came for. A tied head gets its weight by way of the embedding, and
    would go on with its old copy.
    """
    owners: dict[int, torch.nn.Module] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not hasattr(module, "cpu_linear") or not isinstance(weight, torch.nn.Parameter) or not weight.numel():
            continue
        first = owners.setdefault(id(weight), module)
        if first is not module:
            module.quant_method.process_weights_after_loading(module)  # type: ignore[union-attr, operator]


def _tensors(path: str) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt", device="cpu") as file:
        for name in file.keys():  # noqa: SIM118 - the file is no dict
            yield name, file.get_tensor(name)
