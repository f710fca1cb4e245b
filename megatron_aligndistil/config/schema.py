"""The typed configuration of a run: what every one has (``base_schema``), and each algorithm's own sections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from omegaconf import MISSING

from megatron_aligndistil.config.base_schema import ExpManagerConfig, ModelConfig, OptimConfig, TrainerConfig
from megatron_aligndistil.config.optional import OptionalFloat, OptionalStr
from megatron_aligndistil.config.rollout_schema import RewardConfig, RolloutConfig
from megatron_aligndistil.config.training_evaluation_schema import TrainingEvaluationConfig


@dataclass(kw_only=True)
class DPOConfig:
    """``model.dpo`` (paper Eq. 4); reverse_dpo and cdpo take the same section."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    reference_path: OptionalStr = None  # default: restore_from_path


@dataclass(kw_only=True)
class TDPO1Config:
    """``model.tdpo`` of tdpo1 (Zeng et al. 2024)."""

    beta: float = 0.1
    reference_path: OptionalStr = None  # default: restore_from_path


@dataclass(kw_only=True)
class TDPO2Config(TDPO1Config):
    """``model.tdpo`` of tdpo2."""

    alpha: float = 0.5  # of the sequential KLs


@dataclass(kw_only=True)
class SimPOConfig:
    """``model.simpo`` (Meng et al. 2024)."""

    beta: float = 2.0
    gamma: float = 1.0  # the margin itself; the paper also gives gamma / beta, 0.5 here


@dataclass(kw_only=True)
class IPOConfig:
    """``model.ipo`` (Azar et al. 2023)."""

    beta: float = 0.1  # the paper's tau
    # Log-ratios a token, as in TRL, whose comments report that the authors' results were made so; false: of whole
    # responses, as Eq. 17 is written. The margin aimed at is 1 / (2 beta) in either unit.
    normalize_by_length: bool = True
    reference_path: OptionalStr = None  # default: restore_from_path


@dataclass(kw_only=True)
class KTOConfig:
    """``model.kto`` (Ethayarajh et al. 2024)."""

    beta: float = 0.1
    desirable_weight: float = 1.0  # with unbalanced labels: desirable_weight x their count near undesirable's
    undesirable_weight: float = 1.0
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
class TDPO1ModelConfig(ModelConfig):
    tdpo: TDPO1Config = field(default_factory=TDPO1Config)


@dataclass(kw_only=True)
class TDPO2ModelConfig(ModelConfig):
    tdpo: TDPO2Config = field(default_factory=TDPO2Config)


@dataclass(kw_only=True)
class SimPOModelConfig(ModelConfig):
    simpo: SimPOConfig = field(default_factory=SimPOConfig)


@dataclass(kw_only=True)
class IPOModelConfig(ModelConfig):
    ipo: IPOConfig = field(default_factory=IPOConfig)


@dataclass(kw_only=True)
class KTOModelConfig(ModelConfig):
    kto: KTOConfig = field(default_factory=KTOConfig)


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
    evaluation: TrainingEvaluationConfig = field(default_factory=TrainingEvaluationConfig)
    model: ModelConfig = field(default_factory=ModelConfig)


@dataclass(kw_only=True)
class SFTRunConfig(RunConfig):
    model: SFTModelConfig = field(default_factory=SFTModelConfig)


@dataclass(kw_only=True)
class DPORunConfig(RunConfig):
    model: DPOModelConfig = field(default_factory=DPOModelConfig)


@dataclass(kw_only=True)
class TDPO1RunConfig(RunConfig):
    model: TDPO1ModelConfig = field(default_factory=TDPO1ModelConfig)


@dataclass(kw_only=True)
class TDPO2RunConfig(RunConfig):
    model: TDPO2ModelConfig = field(default_factory=TDPO2ModelConfig)


@dataclass(kw_only=True)
class SimPORunConfig(RunConfig):
    model: SimPOModelConfig = field(default_factory=SimPOModelConfig)


@dataclass(kw_only=True)
class IPORunConfig(RunConfig):
    model: IPOModelConfig = field(default_factory=IPOModelConfig)


@dataclass(kw_only=True)
class KTORunConfig(RunConfig):
    model: KTOModelConfig = field(default_factory=KTOModelConfig)


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


# Algorithm → its run.
SCHEMAS: Mapping[str, type[RunConfig]] = {
    "sft": SFTRunConfig,
    "dpo": DPORunConfig,
    "reverse_dpo": DPORunConfig,
    "cdpo": DPORunConfig,
    "tdpo1": TDPO1RunConfig,
    "tdpo2": TDPO2RunConfig,
    "simpo": SimPORunConfig,
    "ipo": IPORunConfig,
    "kto": KTORunConfig,
    "aligndistil": AlignDistilRunConfig,
    "reward_model": RewardModelRunConfig,
    "ppo": PPORunConfig,
    "rto": RTORunConfig,
    "sentence_pg": PolicyGradientRunConfig,
    "token_pg": PolicyGradientRunConfig,
}
