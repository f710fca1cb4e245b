"""Rules on rollouts and rewards, judged from the configuration alone; see ``rules``."""

from __future__ import annotations

from collections.abc import Callable

from megatron_aligndistil.config.reward_keys import reward_complaint
from megatron_aligndistil.config.rollout_schema import RolloutConfig
from megatron_aligndistil.config.rollout_sizes import RolloutSizes
from megatron_aligndistil.config.schema import AlignDistilModelConfig, PPOModelConfig, RunConfig
from megatron_aligndistil.config.vllm_keys import vllm_complaint


def rollout_of(config: RunConfig) -> RolloutConfig | None:
    """The rollouts of a run; None where it trains on a data set's responses."""
    model = config.model
    if isinstance(model, AlignDistilModelConfig) and model.aligndistil.source != "rollout":
        return None
    return getattr(model, "rollout", None)


def rollouts_are_configured_only_where_made(config: RunConfig) -> str | None:
    model = config.model
    if rollout_of(config) is None and isinstance(model, AlignDistilModelConfig) and model.rollout != RolloutConfig():
        return (
            "model.rollout: has no effect with model.aligndistil.source=dataset; set it to rollout, or remove the keys"
        )
    return None


def rollouts_fill_whole_steps(config: RunConfig) -> str | None:
    rollout, batch = rollout_of(config), config.model.global_batch_size
    if rollout is None:
        return None
    samples = rollout.samples_per_prompt
    if rollout.prompts_per_rollout is None and batch % samples:
        return (
            f"model.rollout.samples_per_prompt={samples}: does not divide model.global_batch_size={batch}; change one "
            "of them, or set model.rollout.prompts_per_rollout"
        )
    responses = RolloutSizes.of(rollout, batch).responses
    if responses % batch:
        return (
            f"model.rollout.prompts_per_rollout={rollout.prompts_per_rollout}: with samples_per_prompt={samples} "
            f"{responses} responses, not a multiple of model.global_batch_size={batch}; change one of them"
        )
    return None


def responses_are_as_fresh_as_asked(config: RunConfig) -> str | None:
    rollout = rollout_of(config)
    if rollout is None or rollout.max_off_policy_steps is None:
        return None
    oldest = RolloutSizes.of(rollout, config.model.global_batch_size).max_off_policy_steps
    if oldest > rollout.max_off_policy_steps:
        return (
            f"model.rollout.max_off_policy_steps={rollout.max_off_policy_steps}: responses would be up to {oldest} "
            "steps old; lower prompts_per_rollout, epochs_per_rollout or sync_every, or raise it"
        )
    return None


def prompts_leave_room_for_new_tokens(config: RunConfig) -> str | None:
    rollout, model = rollout_of(config), config.model
    if rollout is None:
        return None
    longest = model.data.max_prompt_length + rollout.max_new_tokens
    if longest > model.encoder_seq_length:
        return (
            f"model.rollout.max_new_tokens={rollout.max_new_tokens}: with model.data.max_prompt_length="
            f"{model.data.max_prompt_length} up to {longest} tokens, above model.encoder_seq_length="
            f"{model.encoder_seq_length}; raise that or lower one of the two"
        )
    return None


def top_p_is_a_share(config: RunConfig) -> str | None:
    rollout = rollout_of(config)
    if rollout is not None and not 0.0 < rollout.top_p <= 1.0:
        return f"model.rollout.top_p={rollout.top_p}: must be in (0, 1]; 1 takes all tokens"
    return None


def responses_are_drawn_not_taken_from_the_data(config: RunConfig) -> str | None:
    responses = config.model.data.responses
    if rollout_of(config) is not None and responses != "chosen":
        return f"model.data.responses={responses}: has no effect, the policy draws its own responses; remove the key"
    return None


def reward_has_what_its_source_needs(config: RunConfig) -> str | None:
    return reward_complaint("model.reward", config.model.reward) if isinstance(config.model, PPOModelConfig) else None


def kl_adapts_in_small_steps(config: RunConfig) -> str | None:
    """kl_coef changes by at most 0.2 x responses / kl_horizon of itself in a rollout."""
    if not isinstance(config.model, PPOModelConfig) or config.model.ppo.kl_target is None:
        return None
    horizon = config.model.ppo.kl_horizon
    responses = RolloutSizes.of(config.model.rollout, config.model.global_batch_size).responses
    if responses >= 5 * horizon:
        return (
            f"model.ppo.kl_horizon={horizon}: a rollout of {responses} responses could bring kl_coef to 0; "
            f"raise it above {responses // 5}"
        )
    return None


def vllm_settings_fit_its_engine(config: RunConfig) -> str | None:
    rollout = rollout_of(config)
    return None if rollout is None else vllm_complaint("model.rollout", rollout)


ROLLOUT_RULES: tuple[Callable[[RunConfig], str | None], ...] = (
    rollouts_are_configured_only_where_made,
    rollouts_fill_whole_steps,
    responses_are_as_fresh_as_asked,
    prompts_leave_room_for_new_tokens,
    top_p_is_a_share,
    responses_are_drawn_not_taken_from_the_data,
    reward_has_what_its_source_needs,
    kl_adapts_in_small_steps,
    vllm_settings_fit_its_engine,
)
