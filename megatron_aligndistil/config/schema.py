"""The typed configuration: every key that a run accepts, with its default. NeMo's names where NeMo has the concept.

No torch, no Hydra here. Dataclasses are not frozen, since OmegaConf must be able to merge overrides into them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from megatron_aligndistil.config.optional import OptionalBool, OptionalFloat, OptionalInt, OptionalStr
from megatron_aligndistil.config.rollout_schema import RewardConfig, RolloutConfig


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
    timeout_minutes: int = 30  # of a collective, before the group is taken down


@dataclass(kw_only=True)
class CheckpointCallbackConfig:
    """``exp_manager.checkpoint_callback_params``."""

    every_n_train_steps: int = 0  # 0: only at the end
    save_top_k: int = 2  # newest checkpoints kept; -1: all
    save_on_train_end: bool = True
    async_save: bool = True
    export_hf_on_train_end: bool = False  # also write a Hugging Face folder to <log dir>/huggingface


@dataclass(kw_only=True)
class ExpManagerConfig:
    """``exp_manager``: where results go and whether to go on from them."""

    explicit_log_dir: OptionalStr = None  # default: runs/<name>
    name: str = MISSING
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
    kernel: KernelConfig = field(default_factory=KernelConfig)


@dataclass(kw_only=True)
class DPOConfig:
    """``model.dpo`` (paper Eq. 4); reverse_dpo takes the same section."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    reference_path: OptionalStr = None  # default: restore_from_path


@dataclass(kw_only=True)
class AlignDistilConfig:
    """``model.aligndistil`` (paper Eq. 16-19)."""

    source: str = "dataset"  # dataset (off-policy, Eq. 19) | rollout (on-policy, Eq. 18; model.rollout)
    reward: str = "contrastive"  # contrastive (DPO against reverse DPO) | vanilla (DPO against the initial model)
    weight: str = "adaptive"  # adaptive (alpha x TVD + epsilon) | constant (alpha for every token)
    alpha: float = 20.0
    epsilon: float = 1e-3
    beta0: float = 0.1
    tvd_scale: float = 1.0  # 2.0 reproduces the authors' TVD, which lacks the factor 1/2
    normalize_by_length: bool = True
    dpo_path: str = MISSING
    reverse_dpo_path: OptionalStr = None  # contrastive only
    # Vanilla's reference, and the model that kl_to_initial is measured to; default: restore_from_path.
    initial_path: OptionalStr = None
    measure_initial_kl: bool = False  # kl_to_initial in training and validation, for one more frozen forward pass
    measure_token_reward: bool = False  # token_reward of the responses themselves, for two more log-probs a token


@dataclass(kw_only=True)
class RewardModelConfig:
    """``model.reward_model`` (paper Eq. 1)."""

    margin_regularisation: float = 0.0  # times the squared sum of a pair's rewards, which Eq. 1 leaves free


@dataclass(kw_only=True)
class CriticConfig:
    """``model.ppo.critic``: the value head's model."""

    path: OptionalStr = None  # default: the reward model, else restore_from_path; a missing head starts at random
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=9e-6))


@dataclass(kw_only=True)
class PPOConfig:
    """``model.ppo``; rto takes the same section."""

    kl_coef: float = 0.01  # of log pi_old - log pi_ref in a token's reward
    kl_target: OptionalFloat = None  # nats a token: adapts kl_coef to hold it
    kl_horizon: int = 10000  # responses over which it adapts
    reference_path: OptionalStr = None  # default: restore_from_path
    clip: float = 0.2
    value_clip: float = 0.2
    discount: float = 1.0
    gae_lambda: float = 0.95
    whiten_advantages: bool = True
    critic: CriticConfig = field(default_factory=CriticConfig)


@dataclass(kw_only=True)
class RTOConfig:
    """``model.rto``: what RTO adds to PPO's token rewards."""

    dpo_path: str = MISSING
    beta1: float = 0.1  # times log pi_d - log pi_ref; the KL penalty beta2 is model.ppo.kl_coef


@dataclass(kw_only=True)
class PolicyGradientConfig:
    """``model.pg``: the scalar policy gradients (paper Eq. 42 and section 6.5)."""

    dpo_path: str = MISSING
    reverse_dpo_path: str = MISSING
    beta0: float = 0.1  # of the contrastive reward
    beta: float = 0.08  # of the KL to the DPO model
    normalize_by_length: bool = True


@dataclass(kw_only=True)
class SFTModelConfig(ModelConfig):
    """SFT has no section of its own."""


@dataclass(kw_only=True)
class DPOModelConfig(ModelConfig):
    dpo: DPOConfig = field(default_factory=DPOConfig)


@dataclass(kw_only=True)
class AlignDistilModelConfig(ModelConfig):
    rollout: RolloutConfig = field(default_factory=RolloutConfig)  # with aligndistil.source=rollout
    aligndistil: AlignDistilConfig = field(default_factory=AlignDistilConfig)


@dataclass(kw_only=True)
class RewardModelModelConfig(ModelConfig):
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)


@dataclass(kw_only=True)
class PPOModelConfig(ModelConfig):
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)


@dataclass(kw_only=True)
class RTOModelConfig(PPOModelConfig):
    rto: RTOConfig = field(default_factory=RTOConfig)


@dataclass(kw_only=True)
class PolicyGradientModelConfig(ModelConfig):
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    pg: PolicyGradientConfig = field(default_factory=PolicyGradientConfig)


@dataclass(kw_only=True)
class RunConfig:
    """A whole run. ``model`` is narrowed by the algorithm's own subclass."""

    algorithm: str = MISSING
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    exp_manager: ExpManagerConfig = field(default_factory=ExpManagerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)


@dataclass(kw_only=True)
class SFTRunConfig(RunConfig):
    model: SFTModelConfig = field(default_factory=SFTModelConfig)


@dataclass(kw_only=True)
class DPORunConfig(RunConfig):
    model: DPOModelConfig = field(default_factory=DPOModelConfig)


@dataclass(kw_only=True)
class AlignDistilRunConfig(RunConfig):
    model: AlignDistilModelConfig = field(default_factory=AlignDistilModelConfig)


@dataclass(kw_only=True)
class RewardModelRunConfig(RunConfig):
    model: RewardModelModelConfig = field(default_factory=RewardModelModelConfig)


@dataclass(kw_only=True)
class PPORunConfig(RunConfig):
    model: PPOModelConfig = field(default_factory=PPOModelConfig)


@dataclass(kw_only=True)
class RTORunConfig(RunConfig):
    model: RTOModelConfig = field(default_factory=RTOModelConfig)


@dataclass(kw_only=True)
class PolicyGradientRunConfig(RunConfig):
    model: PolicyGradientModelConfig = field(default_factory=PolicyGradientModelConfig)
