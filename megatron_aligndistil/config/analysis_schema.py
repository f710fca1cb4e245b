"""The keys of ``aligndistil analyze``: a run's layout and data keys, the models, and each analysis's own section.

Dataclasses are not frozen, since OmegaConf must be able to merge overrides into them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from megatron_aligndistil.config.base_schema import FrozenConfig, KernelConfig
from megatron_aligndistil.config.optional import OptionalBool, OptionalFloat, OptionalInt, OptionalStr
from megatron_aligndistil.config.rollout_schema import VLLMConfig


@dataclass(kw_only=True)
class AnalysisTrainerConfig:
    """``trainer``: how many processes, and the number type of the weights."""

    accelerator: str = "auto"  # auto | gpu | cpu
    num_nodes: int = 1
    devices: int = 1  # processes a node
    precision: str = "bf16-mixed"  # bf16-mixed (bf16 weights), 32, or 64 for checks
    timeout_minutes: float = 30.0  # of a collective, before the group is taken down


@dataclass(kw_only=True)
class BatchDataConfig:
    """``model.data`` where no data set is tokenized: texts and micro-batches as a run's."""

    chat_template: OptionalStr = None  # a Jinja file; default: the tokenizer's own
    batching: str = "bucketed"  # bucketed | packed
    pack_length: OptionalInt = None


@dataclass(kw_only=True)
class AnalysisDataConfig(BatchDataConfig):
    """``model.data``: as a run's."""

    max_prompt_length: int = 1024
    long_prompt: str = "drop"  # drop | truncate_left
    long_response: str = "truncate_right"  # truncate_right | drop
    cache_dir: OptionalStr = None  # tokenized data; default: ~/.cache/megatron_aligndistil
    num_workers: int = 1  # processes that tokenize


@dataclass(kw_only=True)
class PassesModelConfig:
    """``model`` of forward passes: the layout, the lengths, the kernels; as a run's."""

    seed: int = 1234
    micro_batch_size: int = 8  # sequences of a forward pass; with packed rows 1
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: OptionalInt = None
    context_parallel_size: int = 1
    sequence_parallel: bool = False
    encoder_seq_length: int = 2048  # tokens of prompt and response together
    make_vocab_size_divisible_by: int = 128
    transformer_engine: OptionalBool = None  # default: used where installed on a GPU
    data: BatchDataConfig = field(default_factory=BatchDataConfig)
    frozen: FrozenConfig = field(default_factory=FrozenConfig)
    kernel: KernelConfig = field(default_factory=KernelConfig)


@dataclass(kw_only=True)
class AnalysisModelConfig(PassesModelConfig):
    """``model``: that, and how data sets are tokenized."""

    data: AnalysisDataConfig = field(default_factory=AnalysisDataConfig)


@dataclass(kw_only=True)
class AnalysisConfig:
    """What every analysis has."""

    output: str = MISSING  # folder of the results
    trainer: AnalysisTrainerConfig = field(default_factory=AnalysisTrainerConfig)
    model: AnalysisModelConfig = field(default_factory=AnalysisModelConfig)


@dataclass(kw_only=True)
class RewardModelPathsConfig:
    """``models`` of reward_accuracy. A reward whose models aren't all given has no row."""

    reward_model: OptionalStr = None
    dpo: OptionalStr = None
    reverse_dpo: OptionalStr = None
    reference: OptionalStr = None


@dataclass(kw_only=True)
class RewardAccuracyConfig:
    """``analysis`` of reward_accuracy (paper Table 2)."""

    train: list[str] = field(default_factory=list)  # preference pairs: files, folders, hub names
    test: list[str] = field(default_factory=list)
    limit: int = -1  # pairs of each set, drawn with the seed; -1: all
    beta0: float = 0.1
    per_token: bool = False  # also each reward divided by the response's length
    bootstrap_samples: int = 2000
    seed: int = 1234


@dataclass(kw_only=True)
class RewardAccuracyAnalysisConfig(AnalysisConfig):
    models: RewardModelPathsConfig = field(default_factory=RewardModelPathsConfig)
    analysis: RewardAccuracyConfig = field(default_factory=RewardAccuracyConfig)


@dataclass(kw_only=True)
class SamplingConfig:
    """``analysis.sampling``: how answers are drawn; keys as in ``model.rollout``."""

    engine: str = "hf"  # hf (transformers on every rank) | vllm
    max_new_tokens: int = 1024
    temperature: float = 0.0  # 0: the most likely token
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    sync_bucket_mib: int = 256
    hf_batch_size: int = 16
    vllm: VLLMConfig = field(default_factory=VLLMConfig)


@dataclass(kw_only=True)
class AnswerRewardConfig:
    """``analysis.reward``: of whole answers; keys as in ``model.reward``."""

    source: OptionalStr = None  # model | contrastive | vanilla | function; null: none
    path: OptionalStr = None  # the reward model
    dpo_path: OptionalStr = None
    reverse_dpo_path: OptionalStr = None
    initial_path: OptionalStr = None  # vanilla's reference; default: the baseline
    beta0: float = 0.1
    function: OptionalStr = None  # module:name of f(prompts, responses) -> one number a response
    clip: OptionalFloat = None


@dataclass(kw_only=True)
class ExtrapolationTrainingConfig:
    """``analysis.training``: the user's run, of which weight, alpha and the log folder are set for each variant."""

    config_name: str = "aligndistil"
    config_dir: OptionalStr = None
    overrides: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class ExtrapolationConfig:
    """``analysis`` of extrapolation (paper Table 3)."""

    constants: list[float] = field(default_factory=lambda: [1.0, 1.2, 1.5, 1.8, 2.0])
    adaptive: bool = True  # also the run as it is configured, with weight=adaptive
    training: ExtrapolationTrainingConfig = field(default_factory=ExtrapolationTrainingConfig)
    prompts: list[str] = field(default_factory=list)
    limit: int = -1
    # The divergence is an expectation under the policy.
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=1.0))
    reward: AnswerRewardConfig = field(default_factory=AnswerRewardConfig)
    bootstrap_samples: int = 2000
    seed: int = 1234


@dataclass(kw_only=True)
class ExtrapolationAnalysisConfig(AnalysisConfig):
    analysis: ExtrapolationConfig = field(default_factory=ExtrapolationConfig)


@dataclass(kw_only=True)
class TokenModelPathsConfig:
    """``models`` of tokens."""

    dpo: str = MISSING
    reverse_dpo: str = MISSING
    policy: OptionalStr = None  # its KL to the teacher and to the DPO model; null: no such columns


@dataclass(kw_only=True)
class TokensConfig:
    """``analysis`` of tokens; alpha to tvd_scale as in ``model.aligndistil``."""

    data: list[str] = field(default_factory=list)  # whose first rows are shown
    responses: str = "chosen"  # chosen | rejected | greedy (the policy's own, else the DPO model's)
    limit: int = 4
    weight: str = "adaptive"  # adaptive | constant
    alpha: float = 20.0
    epsilon: float = 1e-3
    beta0: float = 0.1
    tvd_scale: float = 1.0
    colour: str = "alpha"  # what the heat map shows: alpha | tvd | reward | kl_to_teacher | kl_to_dpo
    max_new_tokens: int = 128  # of greedy responses


@dataclass(kw_only=True)
class TokensAnalysisConfig(AnalysisConfig):
    models: TokenModelPathsConfig = field(default_factory=TokenModelPathsConfig)
    analysis: TokensConfig = field(default_factory=TokensConfig)


ANALYSES: dict[str, type[AnalysisConfig]] = {
    "reward_accuracy": RewardAccuracyAnalysisConfig,
    "extrapolation": ExtrapolationAnalysisConfig,
    "tokens": TokensAnalysisConfig,
}
