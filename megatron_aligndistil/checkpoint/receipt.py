"""The proof that comes with a conversion: logits against transformers' on a probe batch, and a hash of every tensor.

A reward model's scores, at every position, stand for logits of one column.

Shape legend: B rows and S positions of the probe, T = B·S, V vocabulary (1 for a reward model).
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aligndistil.checkpoint.metadata import read_config
from megatron_aligndistil.checkpoint.sources import TensorSource
from megatron_aligndistil.models import families
from megatron_aligndistil.models.architecture import Architecture
from megatron_aligndistil.models.heads import ScalarProjection, project
from megatron_aligndistil.models.policy import HiddenStateModel
from megatron_aligndistil.parallel import groups
from megatron_aligndistil.parallel.schedule import forward_only
from megatron_aligndistil.types import Batch

FILE = "receipt.json"
PROBE_ROWS, PROBE_LENGTH = 2, 32
_SLICE = 16  # positions whose logits are gathered at once

# Largest logit difference accepted, both programs computing in float32. Its rounding grows with the logits.
ABSOLUTE_TOLERANCE, RELATIVE_TOLERANCE = 1e-4, 1e-5


@dataclass(frozen=True)
class Receipt:
    """What was converted and how well the result agrees.

    ``tensors`` maps Hugging Face names to the SHA-256 of their bytes as they lie in the output; ``differing`` names
    those whose bytes are not the source's (cast to ``dtype``). ``compared`` says what the logit fields are about:
    "logits", or the "scores" of a reward model.
    """

    source: str
    output: str
    form: str
    dtype: str
    layout: str
    architecture: dict[str, Any]
    compared: str
    max_logit_difference: float
    max_logit: float
    tolerance: float
    tensors: dict[str, str]
    differing: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return self.max_logit_difference <= self.tolerance and not self.differing

    def summary(self) -> str:
        """Two lines for the terminal."""
        same = len(self.tensors) - len(self.differing)
        return (
            f"{self.source} -> {self.output} ({self.form}, {self.dtype}, {self.layout})\n"
            f"{'verified' if self.passed else 'NOT VERIFIED'}: {same} of {len(self.tensors)} tensors bit-identical; "
            f"largest difference of {self.compared} to transformers {self.max_logit_difference:.2e} "
            f"(accepted {self.tolerance:.1e}, largest {self.max_logit:.1f})"
        )

    def save(self, folder: Path) -> None:
        """Write ``folder``/receipt.json."""
        versions = {name: version(name) for name in ("torch", "transformers", "megatron-core")}
        partial = folder / f".{FILE}"
        partial.write_text(json.dumps({**asdict(self), "passed": self.passed, "versions": versions}, indent=1) + "\n")
        os.replace(partial, folder / FILE)


def probe_tokens(architecture: Architecture) -> Tensor:
    """The probe: [B, S] tokens over the whole vocabulary, the same for every run."""
    length = min(PROBE_LENGTH, architecture.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(architecture.vocab_size, (PROBE_ROWS, length), generator=generator)


def probe_batch(tokens_BS: Tensor) -> Batch:
    """A micro-batch that selects every position of ``tokens_BS``."""
    rows, length = tokens_BS.shape
    return Batch(
        tokens=tokens_BS,
        labels=tokens_BS.roll(-1, dims=1),
        loss_mask=torch.ones_like(tokens_BS, dtype=torch.bool),
        position_ids=torch.arange(length).expand(rows, length).contiguous(),
        sequence_ids=torch.arange(rows)[:, None].expand(rows, length).contiguous(),
        response_lengths=torch.full((rows,), length),
        origins=tuple(f"probe:{row + 1}" for row in range(rows)),
    )


def megatron_logits(chunks: Sequence[HiddenStateModel], tokens_BS: Tensor) -> Tensor | None:
    """Logits [B, S, V] of the sharded model in float32, on global rank 0's host (None elsewhere). Every rank calls it.

    For this proof only: training never gathers logits. The chunks are left in float32.
    """
    for chunk in chunks:
        chunk.float()
        chunk.config.params_dtype = chunk.config.pipeline_dtype = torch.float32
    batch = probe_batch(tokens_BS).to(torch.device(torch.cuda.current_device()))
    chunk = chunks[-1]

    def keep(hidden_SBH: Tensor, index: int) -> Tensor | None:
        if index:
            return None
        projection = project(chunk, hidden_SBH, batch)
        if isinstance(projection, ScalarProjection):
            return projection.values_BS.reshape(-1, 1).cpu()
        weight = projection.head.weight
        return torch.cat([_full_logits(piece @ weight.T) for piece in projection.hidden_TH.split(_SLICE)])

    # The interleaved schedule wants a micro-batch for each stage; the first one's logits are enough.
    kept = forward_only(chunks, [batch] * (groups.pipeline().size if len(chunks) > 1 else 1), keep)
    columns = 1 if chunk.architecture.scalar_head else chunk.architecture.vocab_size
    logits_TV = _to_first_rank(kept[0] if kept else None, tokens_BS.numel(), columns)
    return None if logits_TV is None else logits_TV.unflatten(0, tuple(tokens_BS.shape))


def _full_logits(shard: Tensor) -> Tensor:
    axis = groups.tensor()
    shards = [torch.empty_like(shard) for _ in range(axis.size)]
    dist.all_gather(shards, shard.contiguous(), group=axis.group)
    return torch.cat(shards, dim=1).float().cpu()


def _to_first_rank(logits: Tensor | None, tokens: int, columns: int) -> Tensor | None:
    """From the last pipeline stage to global rank 0, without padded columns."""
    axis, device = groups.pipeline(), torch.device(torch.cuda.current_device())
    last = axis.size - 1
    if groups.tensor().rank != 0 or axis.rank not in (0, last):
        return None
    if logits is not None:
        logits = logits[:, :columns].contiguous()
        if last != 0:
            dist.send(logits.to(device), dst=dist.get_global_rank(axis.group, 0), group=axis.group)
    elif dist.get_rank() == dist.get_global_rank(axis.group, 0):
        received = torch.empty(tokens, columns, device=device)
        dist.recv(received, src=dist.get_global_rank(axis.group, last), group=axis.group)
        logits = received.cpu()
    return logits if dist.get_rank() == 0 else None


def transformers_logits(path: Path, tokens_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits [B, S, V] of transformers' own model in float32, from a Hugging Face folder or a GGUF file.

    The weights are first rounded to ``dtype``.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    scalar_head = families.architecture_of(read_config(path)).scalar_head
    if path.is_file():
        model = _transformers_gguf(path)
    else:
        kind = AutoModelForSequenceClassification if scalar_head else AutoModelForCausalLM
        model = kind.from_pretrained(
            path, dtype=dtype, attn_implementation="sdpa", use_safetensors=True, trust_remote_code=False
        )
    for parameter in model.parameters():  # not the buffers: RoPE's frequencies stay exact
        parameter.data = parameter.data.to(dtype).float()
    with torch.no_grad():
        if scalar_head:  # its own forward pass gives one score a row, where it finds the row's end
            logits = model.score(model.eval().model(tokens_BS, use_cache=False).last_hidden_state)
        else:
            logits = model.eval()(tokens_BS, use_cache=False).logits
    del model
    gc.collect()
    return logits


def _transformers_gguf(file: Path) -> Any:
    """What ``from_pretrained(gguf_file=...)`` does, without the library that it asks for to place the weights."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(read_config(file), attn_implementation="sdpa")
    tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    # Frequencies are computed on construction, which a meta device cannot do.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model


def tolerance(max_logit: float) -> float:
    """The largest logit difference accepted where the largest logit is ``max_logit``."""
    return max(ABSOLUTE_TOLERANCE, RELATIVE_TOLERANCE * max_logit)


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def source_digests(source: TensorSource, names: Iterable[str], dtype: torch.dtype) -> dict[str, str]:
    """SHA-256 of the named tensors cast to ``dtype``, read one at a time."""
    return {name: digest(source.part(name).take(0, 0, source.shapes[name][0]).to(dtype)) for name in names}
