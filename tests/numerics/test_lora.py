"""LoRA over sharded models against PEFT's over transformers' own: logits, merged weights, exported folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_aligndistil.parallel.setup import Layout
from tests.distributed.harness import run_ranks
from tests.tiny_models import save_tiny

TOLERANCE = 1e-4
RANK, ALPHA = 4, 6.0
LENGTH = 24
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYOUTS = [
    Layout(),
    Layout(tensor=2),
    Layout(tensor=2, sequence_parallel=True),
    Layout(pipeline=2, virtual_pipeline=2),
    Layout(tensor=2, pipeline=2, sequence_parallel=True),
]


def tokens_of(vocab_size: int) -> torch.Tensor:
    return torch.randint(vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def save_peft(base: Path, folder: Path, targets: list[str] = TARGETS, r: int = RANK, **changed: Any) -> Path:
    """A random adapter, made and saved by PEFT."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=r, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM", **changed)
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5 * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return folder


def peft_logits(base: Path, adapter: Path) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        return model(tokens_of(model.config.vocab_size)).logits


def sharded(base: Path, adapter: Path, layout: Layout, output: Path) -> tuple[torch.Tensor | None, ...]:
    """Logits with the adapter laid over, with it merged, and of the base alone; writes it as PEFT and merged."""
    from megatron_aligndistil.checkpoint.adapters import export_peft
    from megatron_aligndistil.checkpoint.hf_export import export_hf
    from megatron_aligndistil.checkpoint.locate import read_architecture, saved_adapter
    from megatron_aligndistil.checkpoint.receipt import megatron_logits
    from megatron_aligndistil.checkpoint.weights import load_adapter, load_weights
    from megatron_aligndistil.models.lora import TRAINED, active
    from megatron_aligndistil.models.policy import ModelSettings, build_chunks
    from megatron_aligndistil.parallel.setup import initialize

    initialize(layout, seed=0, accelerator="cpu")
    architecture = read_architecture(adapter)
    chunks = build_chunks(architecture, ModelSettings(layout, torch.float32, LENGTH, 128, False))
    load_weights(chunks, base)
    saved = saved_adapter(adapter)
    assert saved is not None
    load_adapter(chunks, TRAINED, saved)
    tokens = tokens_of(architecture.vocab_size)
    adapted = megatron_logits(chunks, tokens)
    with active(chunks, None):
        alone = megatron_logits(chunks, tokens)
    export_peft(chunks, base, output / "adapter")
    export_hf(chunks, base, output / "merged", torch.float32)
    load_weights(again := build_chunks(architecture, ModelSettings(layout, torch.float32, LENGTH, 128, False)), adapter)
    assert all(chunk.adapters is None for chunk in again)
    return adapted, megatron_logits(again, tokens), alone


def difference(ours: torch.Tensor | None, theirs: torch.Tensor) -> float:
    assert ours is not None and theirs.abs().max() > 1.0
    return (ours - theirs).abs().max().item()


@pytest.mark.parametrize(
    ("variant", "layout"), [("llama-odd-vocab", LAYOUTS[1]), *(("qwen2", layout) for layout in LAYOUTS)], ids=str
)
def test_logits_and_files_are_those_of_peft(tmp_path, layout, variant):
    from transformers import AutoModelForCausalLM

    base = save_tiny(tmp_path, variant)
    adapter = save_peft(base, tmp_path / "peft")
    expected = peft_logits(base, adapter)
    [(adapted, merged, alone), *_] = run_ranks(layout.replica_size, sharded, base, adapter, layout, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        tokens = tokens_of(plain.config.vocab_size)
        of_base, of_whole = plain(tokens).logits, whole(tokens).logits
    assert (expected - of_base).abs().max() > 0.5  # the adapter does something
    found = {
        "adapted": difference(adapted, expected),
        "merged": difference(merged, expected),
        "base": difference(alone, of_base),
        "exported": difference(peft_logits(base, tmp_path / "adapter"), expected),
        "exported merged": difference(of_whole, expected),
    }
    print(variant, layout, {name: f"{value:.1e}" for name, value in found.items()})
    assert max(found.values()) <= TOLERANCE, found
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "adapter", adapter))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)  # by name, to the bit


def test_parts_of_fused_projections_and_rslora(tmp_path):
    base = save_tiny(tmp_path, "qwen2")
    adapter = save_peft(base, tmp_path / "peft", ["q_proj", "v_proj", "up_proj"], use_rslora=True)
    [(adapted, *_)] = run_ranks(1, sharded, base, adapter, Layout(), tmp_path)
    assert difference(adapted, peft_logits(base, adapter)) <= TOLERANCE


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not implemented"),
        ({"bias": "all"}, "bias='all' is not implemented"),
        ({"peft_type": "IA3"}, "peft_type='IA3' is not implemented"),
        ({"base_model_name_or_path": "somebody/model"}, "no such folder"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ],
)
def test_adapters_of_other_kinds_are_refused(tmp_path, changed, message):
    import json

    from megatron_aligndistil.checkpoint.locate import saved_adapter
    from megatron_aligndistil.errors import CheckpointError

    adapter = save_peft(save_tiny(tmp_path, "qwen2"), tmp_path / "peft")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(CheckpointError, match=message):
        saved_adapter(adapter)


def test_a_wrong_rank_in_the_config_is_refused(tmp_path):
    base = save_tiny(tmp_path, "qwen2")
    adapter = save_peft(base, tmp_path / "peft")
    weights = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in weights if name.endswith("lora_A.weight"))
    save_file(weights | {name: weights[name][:-1].contiguous()}, adapter / "adapter_model.safetensors")
    with pytest.raises(Exception, match="but rank and base model say"):
        run_ranks(1, sharded, base, adapter, Layout(), tmp_path)


def in_memory(base: Path, adapters: dict[str, Path]) -> tuple[int, int, set[str], list[bool]]:
    """Bytes of the model alone; of policy, teachers and initial model; what is trained; which share its base."""
    from megatron_aligndistil.algorithms.table import ALGORITHMS
    from megatron_aligndistil.config.schema import SCHEMAS
    from megatron_aligndistil.launch.models import frozen_models, model_settings, trained_chunks
    from megatron_aligndistil.parallel.setup import initialize

    layout = Layout()
    initialize(layout, seed=0, accelerator="cpu")
    config = SCHEMAS["aligndistil"]()
    config.algorithm, config.trainer.precision = "aligndistil", "32"
    model = config.model
    model.restore_from_path, model.encoder_seq_length = str(base), LENGTH
    model.aligndistil.dpo_path, model.aligndistil.reverse_dpo_path = str(adapters["dpo"]), str(adapters["reverse_dpo"])
    model.aligndistil.measure_initial_kl = True
    settings = model_settings(config, layout)

    def size(chunks: list[Any]) -> int:
        held = {p.data_ptr(): p.numel() * p.element_size() for chunk in chunks for p in chunk.parameters()}
        return sum(held.values())

    alone = size(trained_chunks(config, str(base), False, settings))
    model.peft.peft_scheme, model.peft.lora_tuning.adapter_dim = "lora", 1
    policy = trained_chunks(config, str(base), False, settings)
    frozen = frozen_models(config, ALGORITHMS["aligndistil"](config).every_role, settings, policy)
    trained = {name.rsplit(".adapters.")[-1] for name, p in policy[0].named_parameters() if p.requires_grad}
    everything = size([*policy, *(chunk for one in frozen.values() for chunk in one.chunks)])
    return alone, everything, trained, [one.chunks[0] is policy[0] for one in frozen.values()]


def test_a_policy_and_its_teachers_take_little_more_than_one_model(tmp_path):
    base = save_tiny(tmp_path, "qwen2")
    adapters = {name: save_peft(base, tmp_path / name, r=1) for name in ("dpo", "reverse_dpo")}
    [(alone, everything, trained, shared)] = run_ranks(1, in_memory, base, adapters)
    print(f"{everything / alone:.3f} of one model's {alone} bytes")
    assert 1.0 < everything / alone <= 1.3
    assert trained == {"trained.lora_a", "trained.lora_b"}
    assert shared == [True, True, True]
