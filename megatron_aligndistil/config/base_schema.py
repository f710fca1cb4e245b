"""The keys that every run accepts, with their defaults. NeMo's names where NeMo has the concept.

No torch, no Hydra here. Dataclasses are not frozen, since OmegaConf must be able to merge overrides into them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from megatron_aligndistil.config.optional import OptionalBool, OptionalFloat, OptionalInt, OptionalStr


@dataclass(kw_only=True)
class TrainerConfig:
    """``trainer``: how many processes, for how long."""

    accelerator: str = "auto"  # auto | gpu | cpu
    num_nodes: int = 1
    devices: int = 1  # processes a node
    precision: str = "bf16-mixed"  # bf16-mixed (bf16 weights, fp32 main weights), 32, or 64 for checks
    max_epochs: int = 1
    max_steps: int = -1  # optimizer steps; -1: as many as max_epochs gives
    val_check_interval: int = 0  # steps between validations; 0: only where asked for by the two keys below
    val_before_training: bool = False
    val_after_training: bool = True
    limit_val_batches: int = -1  # global batches a validation; -1: all
    log_every_n_steps: int = 1
    gradient_clip_val: float = 1.0  # 0: no clipping
    timeout_minutes: float = 30.0  # that a phase of a step may last, a collective or not, before the run is ended
    straggler_report_every_n_steps: int = 50  # the slowest rank by phase, to <log dir>/stragglers.jsonl; 0: never


@dataclass(kw_only=True)
class CheckpointCallbackConfig:
    """``exp_manager.checkpoint_callback_params``."""

    every_n_train_steps: int = 0  # 0: only at the end
    save_top_k: int = 2  # checkpoints kept; -1: all
    monitor: OptionalStr = None  # a validation metric, by which the best are kept, and the newest; null: the newest
    mode: str = "min"  # min | max: what is better
    save_on_train_end: bool = True
    async_save: bool = True
    verify_on_load: bool = True  # compare checkpoints with the hashes in their manifests before they are used
    when_damaged: str = "stop"  # the one to resume from: stop | previous (set it aside, go on from the one before)
    export_hf_on_train_end: bool = False  # also write a Hugging Face folder to <log dir>/huggingface, adapters merged
    export_peft_on_train_end: bool = False  # also write the adapter as a PEFT folder to <log dir>/adapter


@dataclass(kw_only=True)
class ExpManagerConfig:
    """``exp_manager``: where results go and whether to go on from them."""

    explicit_log_dir: OptionalStr = None  # default: <exp_dir>/<name>, or <exp_dir>/<name>/<version>
    exp_dir: OptionalStr = None  # default: runs
    name: str = MISSING  # also what the progress bar and Weights & Biases call the run
    version: OptionalStr = None  # default: no folder of its own
    resume_if_exists: bool = False
    resume_ignore_no_checkpoint: bool = True
    create_tensorboard_logger: bool = True
    create_wandb_logger: bool = False
    wandb_logger_kwargs: dict[str, Any] = field(default_factory=lambda: {"project": None, "name": None})  # wandb.init's
    create_checkpoint_callback: bool = True
    checkpoint_callback_params: CheckpointCallbackConfig = field(default_factory=CheckpointCallbackConfig)


@dataclass(kw_only=True)
class DataPrefixConfig:
    """``model.data.data_prefix``: hub names (``name`` or ``name:split``), JSONL or Parquet files, folders of them."""

    train: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class DataConfig:
    """``model.data``: reading, tokenizing, batching."""

    data_prefix: DataPrefixConfig = field(default_factory=DataPrefixConfig)
    # Which responses of a pair an algorithm on single responses takes: chosen | rejected | both.
    responses: str = "chosen"
    chat_template: OptionalStr = None  # a Jinja file; default: the tokenizer's own
    max_prompt_length: int = 1024
    long_prompt: str = "drop"  # drop | truncate_left
    long_response: str = "truncate_right"  # truncate_right | drop
    batching: str = "bucketed"  # bucketed | packed
    pack_length: OptionalInt = None  # tokens of a packed row; default: the longest example that the lengths allow
    cache_dir: OptionalStr = None  # tokenized data; default: ~/.cache/megatron_aligndistil
    shuffle: bool = True
    num_workers: int = 1  # processes that tokenize


@dataclass(kw_only=True)
class SchedConfig:
    """``model.optim.sched``."""

    name: str = "CosineAnnealing"  # CosineAnnealing | WarmupAnnealing (linear decay) | WarmupPolicy (constant)
    warmup_steps: OptionalInt = None
    warmup_ratio: OptionalFloat = None  # share of all steps, where warmup_steps isn't given
    min_lr: float = 0.0


@dataclass(kw_only=True)
class OptimConfig:
    """``model.optim``."""

    name: str = "adam"  # adam | distributed_fused_adam (optimizer state sharded over data-parallel ranks)
    lr: float = 1e-6
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    sched: SchedConfig = field(default_factory=SchedConfig)


@dataclass(kw_only=True)
class FrozenConfig:
    """``model.frozen``: the teachers and references."""

    offload: bool = False  # keep bodies that are not in use in host memory


@dataclass(kw_only=True)
class KernelConfig:
    """``model.kernel``: the loss over the vocabulary."""

    # store: 5 head products a step, the logits' gradient kept in bf16 (fp32) | recompute: 8, nothing kept | auto: store
    # where it fits the workspace
    plan: str = "auto"
    workspace_mib: OptionalInt = None  # memory a call may hold; default: 1024 on a CPU, 4096 on a GPU
    chunk_tokens: OptionalInt = None  # tokens whose logits exist at once; default: as the plan and the device like it
    backend: str = "auto"  # auto | pytorch | native (compiled loops, CPU) | triton (GPU)


@dataclass(kw_only=True)
class LoRATuningConfig:
    """``model.peft.lora_tuning``."""

    target_modules: list[str] = field(
        default_factory=lambda: ["attention_qkv", "attention_dense", "mlp_fc1", "mlp_fc2"]
    )
    adapter_dim: int = 32  # the rank
    alpha: OptionalFloat = None  # the update is scaled by alpha / adapter_dim; default: adapter_dim


@dataclass(kw_only=True)
class PeftConfig:
    """``model.peft``: train adapters over a frozen model."""

    peft_scheme: OptionalStr = None  # lora | None: train every weight
    restore_from_path: OptionalStr = None  # an adapter over model.restore_from_path to go on with
    lora_tuning: LoRATuningConfig = field(default_factory=LoRATuningConfig)


@dataclass(kw_only=True)
class ModelConfig:
    """``model`` without the algorithm's own section."""

    restore_from_path: str = MISSING  # a Hugging Face folder, a GGUF file, a Megatron checkpoint, or a run's log folder
    seed: int = 1234
    micro_batch_size: int = 1
    global_batch_size: int = 128
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: OptionalInt = None  # model chunks a stage
    context_parallel_size: int = 1
    sequence_parallel: bool = False
    encoder_seq_length: int = 2048  # tokens of prompt and response together
    make_vocab_size_divisible_by: int = 128
    activations_checkpoint_granularity: OptionalStr = None  # selective | full
    activations_checkpoint_method: OptionalStr = None  # uniform | block, with full
    activations_checkpoint_num_layers: OptionalInt = None
    transformer_engine: OptionalBool = None  # default: used where installed on a GPU
    megatron_amp_O2: bool = True  # bf16 weights with fp32 main weights; there is no other bf16 mode
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    frozen: FrozenConfig = field(default_factory=FrozenConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    kernel: KernelConfig = field(default_factory=KernelConfig)
