"""Rules that a configuration must keep, judged from it alone: one function a rule, named as a sentence.

A rule answers None, or one line that names the key, the value and the remedy. ``checks`` runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_aligndistil.config.base_schema import ModelConfig, OptimConfig
from megatron_aligndistil.config.key_ranges import (
    AT_LEAST_ONE,
    AT_MOST,
    CHOICES,
    MINUS_ONE_OR_POSITIVE,
    NOT_NEGATIVE,
    PATHS,
    POSITIVE,
)
from megatron_aligndistil.config.schema import (
    AlignDistilModelConfig,
    DPOModelConfig,
    IPOModelConfig,
    KTOModelConfig,
    PPOModelConfig,
    RewardModelModelConfig,
    RunConfig,
    SimPOModelConfig,
    TDPO1ModelConfig,
    TDPO2ModelConfig,
)

Rule = Callable[[RunConfig], str | None]

DATA_FILE_SUFFIXES = (".jsonl", ".json", ".parquet")
ON_PAIRS = (
    DPOModelConfig,
    TDPO1ModelConfig,
    TDPO2ModelConfig,
    SimPOModelConfig,
    IPOModelConfig,
    RewardModelModelConfig,
)


def _present(config: RunConfig, keys: tuple[str, ...]) -> Iterator[tuple[str, object]]:
    """(key, value) of those keys that this run's schema has and that are set."""
    for key in keys:
        value: object = config
        for name in key.split("."):
            # An algorithm may lack a section, or a key of one that it shares.
            value = getattr(value, name, None)
        if value is not None:
            yield key, value


def sequences_per_example(model: ModelConfig) -> int:
    """Two where the examples are pairs, which a micro-batch and a packed row hold together."""
    return 2 if isinstance(model, ON_PAIRS) else 1


def every_choice_is_one_of_its_values(config: RunConfig) -> str | None:
    for key, value in _present(config, tuple(CHOICES)):
        if value not in CHOICES[key]:
            allowed = ", ".join("null" if choice is None else str(choice) for choice in CHOICES[key])
            return f"{key}={value}: not a value of this key; choose one of {allowed}"
    return None


def every_number_is_in_its_range(config: RunConfig) -> str | None:
    bounds = (
        (AT_LEAST_ONE, lambda number: number >= 1, "at least 1"),
        (NOT_NEGATIVE, lambda number: number >= 0, "0 or more"),
        (POSITIVE, lambda number: number > 0, "greater than 0"),
        (MINUS_ONE_OR_POSITIVE, lambda number: number == -1 or number >= 1, "-1 (no limit) or at least 1"),
    )
    for keys, holds, words in bounds:
        for key, value in _present(config, keys):
            if not holds(value) or value in (float("inf"), float("-inf")):
                return f"{key}={value}: out of range; must be {words}"
    for key, most in AT_MOST.items():
        for _, value in _present(config, (key,)):
            if isinstance(value, int | float) and value > most:
                return f"{key}={value}: out of range; must be at most {most}"
    return None


def _optims(config: RunConfig) -> Iterator[tuple[str, OptimConfig]]:
    """(key, section) of every optimizer of this run."""
    yield "model.optim", config.model.optim
    if isinstance(config.model, PPOModelConfig):
        yield "model.ppo.critic.optim", config.model.ppo.critic.optim


def betas_are_two_numbers_below_one(config: RunConfig) -> str | None:
    for key, optim in _optims(config):
        betas = optim.betas
        if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            return f"{key}.betas={betas}: must be two numbers in [0, 1), such as [0.9,0.95]"
    return None


def min_lr_is_at_most_lr(config: RunConfig) -> str | None:
    for key, optim in _optims(config):
        if optim.sched.min_lr > optim.lr:
            return f"{key}.sched.min_lr={optim.sched.min_lr}: above {key}.lr={optim.lr}; lower it"
    return None


def warmup_is_given_once(config: RunConfig) -> str | None:
    for key, optim in _optims(config):
        sched = optim.sched
        if sched.warmup_steps is not None and sched.warmup_ratio is not None:
            return (
                f"{key}.sched.warmup_steps={sched.warmup_steps}: warmup_ratio={sched.warmup_ratio} is set too; "
                f"add {key}.sched.warmup_ratio=null"
            )
        if sched.warmup_ratio is not None and not 0.0 <= sched.warmup_ratio < 1.0:
            return f"{key}.sched.warmup_ratio={sched.warmup_ratio}: must be in [0, 1), a share of all steps"
    return None


def bf16_has_fp32_main_weights(config: RunConfig) -> str | None:
    if not config.model.megatron_amp_O2:
        return "model.megatron_amp_O2=false: there is no bf16 mode without fp32 main weights; set it to true"
    return None


def float64_gradients_are_not_clipped(config: RunConfig) -> str | None:
    trainer = config.trainer
    if trainer.precision == "64" and trainer.gradient_clip_val > 0:
        return (
            f"trainer.gradient_clip_val={trainer.gradient_clip_val}: Megatron-Core clips float32 gradients only; with "
            f"trainer.precision=64 set it to 0"
        )
    return None


def prompt_leaves_room_for_a_response(config: RunConfig) -> str | None:
    longest, prompt = config.model.encoder_seq_length, config.model.data.max_prompt_length
    if longest <= prompt:
        return (
            f"model.encoder_seq_length={longest}: leaves no room for a response after "
            f"model.data.max_prompt_length={prompt}; raise the first or lower the second"
        )
    return None


def packed_row_holds_the_longest_example(config: RunConfig) -> str | None:
    model, data = config.model, config.model.data
    if data.batching != "packed":
        if data.pack_length is not None:
            return f"model.data.pack_length={data.pack_length}: has no effect without model.data.batching=packed"
        return None
    if model.micro_batch_size != 1:
        return (
            f"model.micro_batch_size={model.micro_batch_size}: a micro-batch of model.data.batching=packed is one "
            f"packed row; set it to 1 and size the row by model.data.pack_length"
        )
    count = sequences_per_example(model)
    longest = count * model.encoder_seq_length
    if data.pack_length is not None and data.pack_length < longest:
        return (
            f"model.data.pack_length={data.pack_length}: below the longest example, {count} x model.encoder_seq_length="
            f"{model.encoder_seq_length}; raise it to {longest} or more"
        )
    return None


def pairs_are_not_split_by_responses(config: RunConfig) -> str | None:
    responses = config.model.data.responses
    if sequences_per_example(config.model) == 2 and responses != "chosen":
        return f"model.data.responses={responses}: {config.algorithm} takes both responses of a pair; remove the key"
    return None


def kto_takes_every_response(config: RunConfig) -> str | None:
    responses = config.model.data.responses
    if isinstance(config.model, KTOModelConfig) and responses != "chosen":
        return f"model.data.responses={responses}: kto takes both responses of a pair as labelled; remove the key"
    return None


def kto_has_responses_of_other_prompts(config: RunConfig) -> str | None:
    batch = config.model.global_batch_size
    if isinstance(config.model, KTOModelConfig) and batch < 2:
        return (
            f"model.global_batch_size={batch}: kto estimates its KL on the responses to other prompts of the batch; "
            "raise it to 2 or more"
        )
    return None


def training_data_is_named(config: RunConfig) -> str | None:
    if not config.model.data.data_prefix.train:
        return "model.data.data_prefix.train=[]: no training data; name files or data sets, such as [train.jsonl]"
    return None


def validation_has_data(config: RunConfig) -> str | None:
    """``val_after_training`` is true by default, so without data it just has nothing to do."""
    if config.model.data.data_prefix.validation:
        return None
    trainer = config.trainer
    for key, asked in (
        ("val_check_interval", trainer.val_check_interval > 0),
        ("val_before_training", trainer.val_before_training),
    ):
        if asked:
            value = str(getattr(trainer, key)).lower()
            return f"trainer.{key}={value}: no validation data; set model.data.data_prefix.validation"
    return None


def checkpoints_are_not_both_asked_for_and_off(config: RunConfig) -> str | None:
    manager = config.exp_manager
    every = manager.checkpoint_callback_params.every_n_train_steps
    if every and not manager.create_checkpoint_callback:
        return (
            f"exp_manager.checkpoint_callback_params.every_n_train_steps={every}: has no effect with "
            f"exp_manager.create_checkpoint_callback=false; remove one of them"
        )
    return None


def monitored_metric_is_validated(config: RunConfig) -> str | None:
    monitor = config.exp_manager.checkpoint_callback_params.monitor
    if monitor is None or (config.trainer.val_check_interval and config.model.data.data_prefix.validation):
        return None
    return (
        f"exp_manager.checkpoint_callback_params.monitor={monitor}: a metric of validations, and there are none; set "
        "trainer.val_check_interval and model.data.data_prefix.validation, or remove it"
    )


def wandb_settings_have_a_wandb_logger(config: RunConfig) -> str | None:
    manager = config.exp_manager
    given = {key: value for key, value in manager.wandb_logger_kwargs.items() if value is not None}
    if given and not manager.create_wandb_logger:
        key, value = next(iter(given.items()))
        return (
            f"exp_manager.wandb_logger_kwargs.{key}={value}: has no effect without a logger; "
            f"add exp_manager.create_wandb_logger=true"
        )
    return None


def label_smoothing_keeps_the_preference(config: RunConfig) -> str | None:
    if not isinstance(config.model, DPOModelConfig):
        return None
    smoothing = config.model.dpo.label_smoothing
    if config.algorithm == "cdpo" and not 0.0 < smoothing < 0.5:
        return f"model.dpo.label_smoothing={smoothing}: must be in (0, 0.5) for cdpo; without it use --config-name dpo"
    if not 0.0 <= smoothing < 0.5:
        return f"model.dpo.label_smoothing={smoothing}: must be in [0, 0.5)"
    return None


def contrastive_reward_has_a_reverse_model(config: RunConfig) -> str | None:
    if not isinstance(config.model, AlignDistilModelConfig):
        return None
    section = config.model.aligndistil
    if section.reward == "contrastive" and section.reverse_dpo_path is None:
        return (
            "model.aligndistil.reward=contrastive: needs model.aligndistil.reverse_dpo_path; add it or reward=vanilla"
        )
    if section.reward == "vanilla" and section.reverse_dpo_path is not None:
        return f"model.aligndistil.reverse_dpo_path={section.reverse_dpo_path}: unused by reward=vanilla; remove it"
    return None


def initial_model_is_used_where_named(config: RunConfig) -> str | None:
    if not isinstance(config.model, AlignDistilModelConfig):
        return None
    section = config.model.aligndistil
    if section.initial_path is not None and section.reward != "vanilla" and not section.measure_initial_kl:
        return (
            f"model.aligndistil.initial_path={section.initial_path}: used by reward=vanilla and measure_initial_kl=true"
            f" only; add one of them or remove it"
        )
    return None


def every_path_exists(config: RunConfig) -> str | None:
    for key, value in _present(config, PATHS):
        if not Path(str(value)).expanduser().exists():
            return f"{key}={value}: no such file or folder; correct the path"
    prefix = config.model.data.data_prefix
    for key in ("train", "validation"):
        for name in getattr(prefix, key):
            looks_local = name.endswith(DATA_FILE_SUFFIXES) or name.startswith(("/", "./", "../", "~"))
            if looks_local and not Path(name).expanduser().exists():
                return f"model.data.data_prefix.{key}: {name}: no such file or folder; correct the path"
    return None


# These come first: the others may divide by what they have judged.
CHOICE_AND_RANGE_RULES: tuple[Rule, ...] = (every_choice_is_one_of_its_values, every_number_is_in_its_range)
RULES: tuple[Rule, ...] = (
    betas_are_two_numbers_below_one,
    min_lr_is_at_most_lr,
    warmup_is_given_once,
    bf16_has_fp32_main_weights,
    float64_gradients_are_not_clipped,
    prompt_leaves_room_for_a_response,
    packed_row_holds_the_longest_example,
    pairs_are_not_split_by_responses,
    kto_takes_every_response,
    kto_has_responses_of_other_prompts,
    training_data_is_named,
    validation_has_data,
    checkpoints_are_not_both_asked_for_and_off,
    monitored_metric_is_validated,
    wandb_settings_have_a_wandb_logger,
    label_smoothing_keeps_the_preference,
    contrastive_reward_has_a_reverse_model,
    initial_model_is_used_where_named,
    every_path_exists,
)
