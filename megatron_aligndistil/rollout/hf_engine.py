"""The engine that needs nothing but transformers: every rank draws with a whole model of its own.

Shape legend: B responses of a batch, S positions, T new positions, V vocabulary size, H hidden size, N scored tokens of
a batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from megatron_aligndistil.errors import RolloutError
from megatron_aligndistil.rollout.engine import Request, Sampling
from megatron_aligndistil.types import Sample

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SCORED_LOGITS = 2**24  # logits that exist at a time while scoring: 64 MiB in float32
NAMES_SHOWN = 3


class HFEngine:
    """A transformers model on this rank's device; see ``rollout.engine.Engine`` for what its methods promise.

    A token depends on the weights, the tokens before it, the sampling, the request's seed and its place in the
    response. The rows that are computed beside it change its logits by no more than rounding does.
    """

    generates = True

    def __init__(self, config: PretrainedConfig, device: torch.device, dtype: torch.dtype, batch_size: int) -> None:
        """An empty model of ``config``'s shape, to be filled by an update.

        ``dtype`` is the weights'; ``batch_size`` responses are drawn, or sequences scored, at a time.
        """
        self._device, self._batch_size = device, batch_size
        self._positions: int = config.max_position_embeddings
        self._model = _empty_model(config, device, dtype)
        self._missing: dict[str, Tensor] = dict(self._model.named_parameters())

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Sample]:
        """One response a request, in order.

        Raises:
            RolloutError: a prompt leaves too few of the model's positions, or logits aren't finite.
        """
        self._check_weights()
        self._check_room(requests, sampling)
        samples: dict[int, Sample] = {}
        for indices in self._batches([request.prompt for request in requests]):
            batch = [requests[index] for index in indices]
            samples.update(zip(indices, self._generate_batch(batch, sampling), strict=True))
        return [samples[index] for index in range(len(requests))]

    @torch.no_grad()
    def score(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-probs, nats, of the tokens 1, 2, … of each sequence int32 [S]: float32 [S - 1]."""
        self._check_weights()
        scores: dict[int, np.ndarray] = {}
        for indices in self._batches(sequences):
            batch = [sequences[index] for index in indices]
            scores.update(zip(indices, self._score_batch(batch), strict=True))
        return [scores[index] for index in range(len(sequences))]

    def begin_update(self) -> None:
        """New weights follow."""
        self._missing = dict(self._model.named_parameters())

    @torch.no_grad()
    def load(self, bucket: Mapping[str, Tensor]) -> None:
        """Copy whole tensors, under Hugging Face names, into the model; each is cast to the model's type.

        Raises:
            RuntimeError: the model has no such parameter, has one of another shape, or was given it before.
        """
        for name, tensor in bucket.items():
            parameter = self._missing.pop(name, None)
            if parameter is None:
                raise RuntimeError(f"{name} is no parameter of the model, or was given twice in an update")
            if parameter.shape != tensor.shape:
                raise RuntimeError(f"{name} has shape {tuple(tensor.shape)}; the model's is {tuple(parameter.shape)}")
            parameter.copy_(tensor)

    def end_update(self) -> None:
        """All weights were given.

        Raises:
            RuntimeError: they weren't.
        """
        self._check_weights()

    def sleep(self) -> None:
        """Move the weights to host memory, where the device has its own."""
        self._move(torch.device("cpu"))

    def wake(self) -> None:
        """Move them back."""
        self._move(self._device)

    def restart(self) -> None:
        """Never called: what runs in this process is not lost without it."""
        raise RuntimeError("the transformers engine is never lost, so there is nothing to restart")

    def close(self) -> None:
        """Drop the model; nothing but ``close`` can be called after it."""
        self._model = None
        self._missing = {}

    def _move(self, device: torch.device) -> None:
        if self._device.type == "cuda":
            self._model.to(device)

    def _check_weights(self) -> None:
        if self._missing:
            names = ", ".join(sorted(self._missing)[:NAMES_SHOWN])
            raise RuntimeError(f"{len(self._missing)} parameters were not given in the update: {names}, …")

    def _check_room(self, requests: Sequence[Request], sampling: Sampling) -> None:
        longest = max((len(request.prompt) for request in requests), default=0)
        if longest + sampling.max_new_tokens > self._positions:
            raise RolloutError(
                f"a prompt of {longest} tokens and model.rollout.max_new_tokens={sampling.max_new_tokens} need more "
                f"than the policy's {self._positions} positions (max_position_embeddings); lower "
                "model.data.max_prompt_length or model.rollout.max_new_tokens"
            )

    def _batches(self, rows: Sequence[np.ndarray]) -> Iterator[list[int]]:
        """Indices of rows of similar length; the longest come first, so that too little memory shows at once."""
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        for start in range(0, len(order), self._batch_size):
            yield order[start : start + self._batch_size]

    def _generate_batch(self, requests: Sequence[Request], sampling: Sampling) -> list[Sample]:
        from transformers import GenerationConfig

        stops = list(sampling.stop_token_ids)
        pad = stops[0] if stops else 0
        tokens_BS, mask_BS = _padded([request.prompt for request in requests], pad, left=True)
        drawing = _Drawing(sampling, _uniforms([request.seed for request in requests], sampling, self._device))
        out_BS = self._model.generate(
            input_ids=tokens_BS.to(self._device),
            attention_mask=mask_BS.to(self._device),
            logits_processor=[drawing],
            generation_config=GenerationConfig(
                max_new_tokens=sampling.max_new_tokens,
                do_sample=False,  # drawing has left one token with a finite score
                eos_token_id=stops or None,
                pad_token_id=pad,
                use_cache=True,
            ),
        )
        new_BT = out_BS[:, tokens_BS.shape[1] :].cpu().numpy()
        logprobs_BT = torch.stack(drawing.logprobs, dim=1).cpu().numpy()
        return [_sample(*row, stops) for row in zip(new_BT, logprobs_BT, strict=True)]

    def _score_batch(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        tokens_BS, mask_BS = _padded(sequences, 0, left=False)
        tokens_BS, mask_BS = tokens_BS.to(self._device), mask_BS.to(self._device)
        decoder, head = self._model.get_decoder(), self._model.get_output_embeddings()
        hidden_BSH = decoder(input_ids=tokens_BS, attention_mask=mask_BS, use_cache=False).last_hidden_state
        is_label_BS = mask_BS[:, 1:].bool()
        hidden_NH, labels_N = hidden_BSH[:, :-1][is_label_BS], tokens_BS[:, 1:][is_label_BS]
        chunk = max(1, SCORED_LOGITS // self._model.config.vocab_size)
        logprobs_N = torch.empty(len(labels_N), dtype=torch.float32, device=self._device)
        for start in range(0, len(labels_N), chunk):
            part = slice(start, start + chunk)
            logprobs_N[part] = _logprobs(head(hidden_NH[part]).float(), labels_N[part])
        ends = np.cumsum([len(sequence) - 1 for sequence in sequences])
        return np.split(logprobs_N.cpu().numpy(), ends[:-1])


class _Drawing:
    """The logits processor of one batch: it draws the tokens, and leaves them to ``generate`` as the only ones.

    ``logprobs`` holds, a position, the float32 [B] log-probs of the tokens that were drawn, at temperature 1. They mean
    nothing on rows that have ended.
    """

    def __init__(self, sampling: Sampling, uniforms_BT: Tensor) -> None:
        self.logprobs: list[Tensor] = []
        self._uniforms_BT = uniforms_BT
        self._is_greedy = sampling.temperature == 0
        self._warpers = [] if self._is_greedy else _warpers(sampling)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] that leave one token a row. ``scores`` float32 [B, V] are the model's logits."""
        tokens_B = scores.argmax(-1) if self._is_greedy else self._draw(input_ids, scores)
        self.logprobs.append(_logprobs(scores, tokens_B))
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens_B[:, None], 0.0)

    def _draw(self, input_ids: Tensor, logits_BV: Tensor) -> Tensor:
        for warp in self._warpers:
            logits_BV = warp(input_ids, logits_BV)
        # In float64 the sum over the vocabulary rounds too little to favour its end. The first entry beyond the drawn
        # height is never one of probability 0: it stands as high as its predecessor.
        heights_BV = logits_BV.double().softmax(-1).cumsum(-1)
        drawn_B = self._uniforms_BT[:, len(self.logprobs)] * heights_BV[:, -1]
        tokens_B = torch.searchsorted(heights_BV, drawn_B[:, None], right=True)[:, 0]
        return tokens_B.clamp(max=logits_BV.shape[1] - 1)  # NaN sorts past the end; its log-prob tells on it


def _warpers(sampling: Sampling) -> list[Callable[[Tensor, Tensor], Tensor]]:
    """What changes logits before drawing, in the order of transformers and vLLM."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers: list[Callable[[Tensor, Tensor], Tensor]] = []
    if sampling.temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k > 0:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return warpers


def _uniforms(seeds: Sequence[int], sampling: Sampling, device: torch.device) -> Tensor:
    """Numbers in [0, 1), float64 [B, T]; each depends on its seed and position alone, whatever else is drawn.

    Philox counts positions, and its raw stream is fixed for all versions of NumPy.
    """
    raw_BT = np.stack([np.random.Philox(key=seed % 2**64).random_raw(sampling.max_new_tokens) for seed in seeds])
    return torch.from_numpy((raw_BT >> np.uint64(11)) * 2.0**-53).to(device)


def _logprobs(logits_RV: Tensor, tokens_R: Tensor) -> Tensor:
    """Log-probs [R] of one token a row of logits [R, V]."""
    return logits_RV.gather(-1, tokens_R[:, None])[:, 0] - logits_RV.logsumexp(-1)


def _sample(tokens_T: np.ndarray, logprobs_T: np.ndarray, stops: Sequence[int]) -> Sample:
    """A row of a batch up to its end, which the batch may have gone past."""
    ends = np.flatnonzero(np.isin(tokens_T, stops))
    length = int(ends[0]) + 1 if ends.size else len(tokens_T)
    if not np.isfinite(logprobs_T[:length]).all():
        raise RolloutError(
            "the policy's logits are not finite in the transformers engine, so nothing can be drawn from them; "
            "check the run's loss and grad_norm, and lower model.optim.lr"
        )
    return Sample(tokens_T[:length].astype(np.int32), logprobs_T[:length].copy(), "stop" if ends.size else "length")


def _padded(rows: Sequence[np.ndarray], pad: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids [B, S] int64, and the mask [B, S] int64 that is 0 on padding, which comes first if ``left``."""
    width = max(map(len, rows))
    tokens_BS, mask_BS = np.full((len(rows), width), pad, dtype=np.int64), np.zeros((len(rows), width), dtype=np.int64)
    for index, row in enumerate(rows):
        held = slice(width - len(row), width) if left else slice(0, len(row))
        tokens_BS[index, held], mask_BS[index, held] = row, 1
    return torch.from_numpy(tokens_BS), torch.from_numpy(mask_BS)


def _empty_model(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """A model whose parameters hold anything; buffers, which no update brings, are right.

    Nothing is drawn from torch's generators, which belong to training.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.initialization import no_init_weights

    with torch.device(device), no_init_weights():
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)  # it writes dtype to the config
    model.tie_weights()  # a part of what no_init_weights leaves out
    model.generation_config = GenerationConfig()  # of the model's own defaults, none applies
    return model.eval().requires_grad_(False)
