"""``aligndistil convert``: a model from any form to any form, with a receipt."""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from megatron_aligndistil.checkpoint.adapter_config import SavedAdapter
from megatron_aligndistil.checkpoint.adapters import export_peft
from megatron_aligndistil.checkpoint.hf_export import MAX_SHARD_BYTES, export_hf
from megatron_aligndistil.checkpoint.index import stored_dtypes
from megatron_aligndistil.checkpoint.integrity import verify_model
from megatron_aligndistil.checkpoint.locate import (
    FORMAT,
    METADATA,
    STATE,
    WEIGHTS,
    kind_of,
    metadata_source,
    model_path,
    read_architecture,
    saved_adapter,
)
from megatron_aligndistil.checkpoint.manifest import leave_records, write_manifest
from megatron_aligndistil.checkpoint.metadata import copy_metadata
from megatron_aligndistil.checkpoint.receipt import (
    FILE,
    Receipt,
    digest,
    megatron_logits,
    probe_tokens,
    source_digests,
    tolerance,
    transformers_logits,
)
from megatron_aligndistil.checkpoint.staging import staged_folder
from megatron_aligndistil.checkpoint.weights import load_adapter, load_weights, open_source, save_weights
from megatron_aligndistil.config.base_schema import ModelConfig
from megatron_aligndistil.errors import CheckpointError, ConfigError, UserError
from megatron_aligndistil.models.architecture import Architecture
from megatron_aligndistil.models.gathering import hf_tensors
from megatron_aligndistil.models.lora import TRAINED
from megatron_aligndistil.models.policy import HiddenStateModel, ModelSettings, build_chunks
from megatron_aligndistil.parallel.collectives import barrier, from_first_rank
from megatron_aligndistil.parallel.setup import Layout, initialize, shutdown

Form = Literal["megatron", "hf", "peft"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SEED = 0  # nothing is drawn


@dataclass(frozen=True)
class ConvertRequest:
    """One conversion. ``dtype``: "float32", "bfloat16" or "keep".

    to  None: the other form than the input's, which is "hf" for an adapter
    """

    input: Path
    output: Path
    to: Form | None = None
    dtype: str = "keep"
    verify: bool = True
    layout: Layout = field(default_factory=Layout)
    max_shard_bytes: int = MAX_SHARD_BYTES


def convert(request: ConvertRequest) -> Receipt | None:
    """Convert in the layout whose groups are running; every rank calls it. The receipt on rank 0, if ``verify``.

    An adapter becomes a whole model, merged, or a PEFT folder, for which there is no receipt. Memory holds one model:
    ours is dropped before transformers' is loaded for the receipt. The receipt computes in float32, so that with
    ``verify`` it is the float32 model.

    Raises:
        CheckpointError: unreadable input, unwritable output, or a result that doesn't agree with transformers.
        ConfigError: the layout doesn't fit the model.
    """
    source = model_path(request.input)
    saved = saved_adapter(source)
    form = _form(request.to, source, saved)
    if request.verify:
        verify_model(source)
    architecture = read_architecture(source)
    check_layout(architecture, request.layout)
    dtype = _DTYPES[request.dtype] if request.dtype in _DTYPES else _stored_dtype(source)
    chunks = build_chunks(architecture, _settings(architecture, request.layout, dtype))
    if saved and form == "peft":
        _write_peft(chunks, saved, request.output)
        return None
    load_weights(chunks, source)
    if form == "hf":
        digests = export_hf(chunks, metadata_source(source), request.output, dtype, request.max_shard_bytes)
    else:
        _write_megatron(chunks, metadata_source(source), request.output, dtype)
        digests = {}
    if not request.verify:
        return None
    if form == "megatron":
        load_weights(chunks, request.output)  # what the files hold, not what memory held
        digests = {name: digest(tensor) for name, tensor in hf_tensors(chunks)}
    tokens = probe_tokens(architecture)
    ours = megatron_logits(chunks, tokens)
    chunks.clear()
    receipt = None
    if dist.get_rank() == 0 and ours is not None:
        theirs, digests, differing = _other_side(source, request.output, dtype, digests)
        logits = transformers_logits(theirs, tokens, dtype)
        largest = logits.abs().max().item()
        receipt = Receipt(
            source=str(request.input),
            output=str(request.output),
            form=form,
            dtype=str(dtype).removeprefix("torch."),
            layout=str(request.layout),
            architecture=asdict(architecture),
            compared="scores" if architecture.scalar_head else "logits",
            max_logit_difference=(ours - logits).abs().max().item(),
            max_logit=largest,
            tolerance=tolerance(largest),
            tensors=digests,
            differing=differing,
        )
        receipt.save(request.output)
    if from_first_rank(receipt is not None and not receipt.passed):
        raise CheckpointError(f"{request.output}: written, but it doesn't agree with transformers; see {FILE} in it")
    return receipt


def _other_side(
    source: Path, output: Path, dtype: torch.dtype, digests: dict[str, str]
) -> tuple[Path, dict[str, str], tuple[str, ...]]:
    """The Hugging Face side that transformers shall read, the output's hashes, and the tensors that differ.

    ``digests`` are those of the Megatron side.
    """
    in_files = kind_of(output) == "huggingface"
    written = source_digests(open_source(output), digests, dtype) if in_files else digests
    if kind_of(source) == "megatron" or saved_adapter(source):
        theirs, expected = output, digests
    else:
        theirs, expected = source, source_digests(open_source(source), digests, dtype)
    return theirs, written, tuple(name for name in written if written[name] != expected[name])


def _form(asked: Form | None, source: Path, saved: SavedAdapter | None) -> Form:
    """What to write: what is asked for, if that can be, or else the other form than the source's."""
    kind = kind_of(source)
    form = asked or ("hf" if kind == "megatron" or saved else "megatron")
    if saved is None and form == "peft":
        raise ConfigError(f"{source}: a whole model, not an adapter; use --to hf or megatron")
    if saved is not None and form == "megatron":
        raise ConfigError(f"{source}: an adapter; merge it with --to hf, and convert that")
    if kind == form:
        raise ConfigError(f"{source}: has that form already, and it suits every layout; use --to hf")
    return form


def check_layout(architecture: Architecture, layout: Layout) -> None:
    """Refuse a layout that cannot divide the model.

    Raises:
        ConfigError: names the sizes and the key.
    """
    for what, size in {
        "attention heads": architecture.num_attention_heads,
        "query groups": architecture.num_query_groups,
        "feed-forward features": architecture.ffn_hidden_size,
    }.items():
        if size % layout.tensor:
            raise ConfigError(f"tensor_model_parallel_size={layout.tensor} does not divide the model's {size} {what}")
    if architecture.num_layers % layout.pipeline:
        raise ConfigError(
            f"pipeline_model_parallel_size={layout.pipeline} does not divide the model's "
            f"{architecture.num_layers} layers"
        )


def _settings(architecture: Architecture, layout: Layout, dtype: torch.dtype) -> ModelSettings:
    return ModelSettings(
        layout=layout,
        dtype=dtype,
        max_sequence_length=architecture.max_position_embeddings,
        vocab_divisible_by=ModelConfig.make_vocab_size_divisible_by,
        transformer_engine=False,
    )


def _stored_dtype(source: Path) -> torch.dtype:
    """The widest dtype among the source's tensors; an adapter's base has it."""
    if saved := saved_adapter(source):
        return _stored_dtype(model_path(saved.base))
    if kind_of(source) == "megatron":
        dtypes = set(stored_dtypes(source / WEIGHTS).values())
    else:
        dtypes = set(open_source(source).dtypes.values())
    return max(dtypes, key=lambda dtype: (dtype.itemsize, torch.finfo(dtype).max))


def _write_peft(chunks: Sequence[HiddenStateModel], saved: SavedAdapter, output: Path) -> None:
    load_weights(chunks, saved.base)
    load_adapter(chunks, TRAINED, saved)
    export_peft(chunks, saved.base, output)


def _write_megatron(chunks: Sequence[HiddenStateModel], metadata: Path, output: Path, dtype: torch.dtype) -> None:
    with staged_folder(output) as staging:
        save_weights(chunks, staging)
        leave_records(staging, WEIGHTS, dist.get_rank())
        barrier()
        failure = None
        if dist.get_rank() == 0:
            try:
                copy_metadata(metadata, staging / METADATA, dtype, chunks[0].architecture.scalar_head)
                (staging / STATE).write_text(json.dumps({"format": FORMAT, "step": 0}) + "\n")
                write_manifest(staging)
            except OSError as error:
                failure = f"{output}: cannot write: {error.strerror or error}"
        if failure := from_first_rank(failure):
            raise CheckpointError(failure)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code (2 after an error of the user's, which is one line)."""
    options = _parser().parse_args(arguments)
    layout = Layout(tensor=options.tensor_model_parallel_size, pipeline=options.pipeline_model_parallel_size)
    first = os.environ.get("RANK", "0") == "0"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # conversion is copying: the host's memory is the larger one
    start = time.perf_counter()
    try:
        kind_of(options.input)
        _check_world(layout)
        initialize(layout, _SEED, accelerator="cpu")
        receipt = convert(
            ConvertRequest(
                input=options.input,
                output=options.output,
                to=options.to,
                dtype=options.dtype,
                verify=not options.no_verify,
                layout=layout,
                max_shard_bytes=int(options.max_shard_gib * 2**30),
            )
        )
    except UserError as error:
        if first:
            print(f"error: {error}", file=sys.stderr)
        return 2
    shutdown()
    if first:
        print(receipt.summary() if receipt else f"{options.input} -> {options.output} (not verified)")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{time.perf_counter() - start:.1f} s, peak memory {peak:.2f} GiB a process")
    return 0


def _check_world(layout: Layout) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != layout.replica_size:
        raise ConfigError(
            f"{layout} takes {layout.replica_size} processes, but {world} run; "
            f"start it by torchrun --nproc-per-node {layout.replica_size}"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aligndistil convert",
        description="Convert a model between Hugging Face (safetensors or GGUF) and Megatron-Core's distributed "
        "checkpoint, and verify the result against transformers.",
    )
    parser.add_argument(
        "input", type=Path, help="Hugging Face or PEFT folder, .gguf file, Megatron checkpoint, run folder"
    )
    parser.add_argument("output", type=Path, help="folder to write; it must not hold anything yet")
    parser.add_argument("--to", choices=("hf", "megatron", "peft"), help="form of the output (default: the other one)")
    parser.add_argument("--dtype", choices=(*_DTYPES, "keep"), default="keep", help="of the output's weights")
    parser.add_argument(
        "--no-verify", action="store_true", help="skip the input's hashes, and the comparison with transformers"
    )
    parser.add_argument("--max-shard-gib", type=float, default=MAX_SHARD_BYTES / 2**30, help="of a safetensors file")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1, help="under torchrun")
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1, help="under torchrun")
    return parser
