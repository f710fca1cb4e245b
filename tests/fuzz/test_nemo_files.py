"""NeMo-Aligner's files: translated, with an account of every key, or one line that names the file."""

from __future__ import annotations

from pathlib import Path

import yaml
from hypothesis import strategies as st

from megatron_aligndistil.config.nemo_translation import translate
from tests.fuzz.mutations import junk_scalars, spoiled_bytes, spoiled_json
from tests.fuzz.reader import Reader

SAMPLE = {
    "trainer": {
        "num_nodes": 1,
        "devices": 8,
        "precision": "bf16-mixed",
        "dpo": {"max_epochs": 1, "max_steps": -1, "val_check_interval": 0.1, "gradient_clip_val": 1.0},
    },
    "exp_manager": {"explicit_log_dir": "logs", "create_wandb_logger": False, "wandb_logger_kwargs": {"name": "x"}},
    "model": {
        "micro_batch_size": 1,
        "global_batch_size": 64,
        "tensor_model_parallel_size": 2,
        "encoder_seq_length": 4096,
        "dpo": {"ref_policy_kl_penalty": 0.2, "preference_loss": "dpo", "log_prob_forward_micro_batch_size": 1},
        "optim": {"name": "distributed_fused_adam", "lr": 9e-7, "betas": [0.9, 0.98], "sched": {"warmup_steps": 10}},
        "data": {"data_prefix": {"train": ["a.jsonl"], "validation": ["b.jsonl"]}, "seq_length": "${model.x}"},
        "peft": {"peft_scheme": "lora", "lora_tuning": {"adapter_dim": 32, "target_modules": ["attention_qkv"]}},
    },
    "pretrained_checkpoint": {"restore_from_path": "model.nemo"},
}


def test_nemo_files(record, tmp_path: Path) -> None:
    reader, file = Reader("NeMo files"), tmp_path / "old.yaml"
    sound = yaml.safe_dump(SAMPLE).encode()
    values = spoiled_json([SAMPLE]).map(lambda text: text.encode("utf-8", "surrogatepass"))
    keys = st.sampled_from([(section, key) for section in ("trainer", "model") for key in SAMPLE[section]])
    one = st.tuples(keys, junk_scalars()).map(
        lambda drawn: yaml.safe_dump({**SAMPLE, drawn[0][0]: {**SAMPLE[drawn[0][0]], drawn[0][1]: drawn[1]}}).encode(
            "utf-8", "surrogatepass"
        )
    )

    def check(content: bytes) -> None:
        file.write_bytes(content)
        reader.read(lambda: _translated(file), file)

    record(reader.fuzz(values | one | spoiled_bytes([sound]), check))


def _translated(file: Path) -> None:
    made = translate(file)
    assert made.yaml()
    assert list(made.account())
