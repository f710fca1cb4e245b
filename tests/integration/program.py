"""Running ``aligndistil`` as a user does: a child process, its exit code, what it printed, what it wrote."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

LIMIT_SECONDS = 240
WORDS = ["red", "green", "blue", "stone", "river", "cloud", "bird", "leaf", "sand", "moon", "star", "wind", "rain"]


@dataclass(frozen=True)
class Finished:
    """An ended run of the program."""

    exit_code: int
    errors: str

    @property
    def error_lines(self) -> list[str]:
        """The lines that the program itself presents as errors."""
        return [line for line in self.errors.splitlines() if line.startswith("aligndistil: ")]


def environment() -> dict[str, str]:
    """One thread a rank, and no warnings of libraries between the lines."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def start(*arguments: str) -> subprocess.Popen[str]:
    """Start the program in a process group of its own."""
    command = [sys.executable, "-m", "megatron_aligndistil", *arguments]
    # Tests that run in a shell's background would pass on that Ctrl-C is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
            start_new_session=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)


def run(*arguments: str, limit_seconds: float = LIMIT_SECONDS) -> Finished:
    """Run the program to its end; it and everything it started is killed after ``limit_seconds``."""
    process = start(*arguments)
    try:
        _, errors = process.communicate(timeout=limit_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, errors = process.communicate()
        raise AssertionError(f"no end after {limit_seconds} s:\n{errors[-4000:]}") from None
    return Finished(process.returncode, errors)


def run_and_kill(log_dir: Path, after_step: int, delay: float, *arguments: str) -> None:
    """Run the program; SIGKILL it ``delay`` seconds after it has logged ``after_step`` and has a whole checkpoint."""
    process = start(*arguments)
    deadline = time.monotonic() + LIMIT_SECONDS

    def has_gone_far_enough() -> bool:
        return max([0, *losses(log_dir)]) >= after_step and any(log_dir.glob("checkpoints/step_*"))

    while process.poll() is None and not has_gone_far_enough():
        assert time.monotonic() < deadline, "the run logs no steps, or saves nothing"
        time.sleep(0.02)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, f"the run ended before it was killed: {errors[-3000:]}"


def records(log_dir: Path, phase: str = "train") -> list[dict[str, Any]]:
    """The whole lines of ``metrics.jsonl``."""
    path = log_dir / "metrics.jsonl"
    if not path.exists():
        return []
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [record for record in map(json.loads, lines) if record["phase"] == phase]


def losses(log_dir: Path) -> dict[int, float]:
    """Training loss by step."""
    return {record["step"]: record["loss"] for record in records(log_dir)}


def write_pairs(path: Path, rows: int, seed: int = 0) -> Path:
    """A JSONL file of preference pairs of random words."""
    rng = np.random.default_rng(seed)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS, int(rng.integers(low, high))))

    lines = []
    for _ in range(rows):
        prompt, chosen, rejected = text(2, 8), text(3, 12), text(3, 12)
        lines.append(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}))
    path.write_text("\n".join(lines) + "\n")
    return path


def write_model(folder: Path, seed: int, words: list[str] = WORDS) -> Path:
    """A random Qwen2-shaped model with a byte-level tokenizer learnt from ``words`` and a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([" ".join(words)], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template=(
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<eos>{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}"
        ),
    )
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
