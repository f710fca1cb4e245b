"""Rules on rollouts and rewards: each names the key, the value and a remedy; and what the sizes come to."""

from __future__ import annotations

import pytest

from megatron_aligndistil.config import checks
from megatron_aligndistil.config.rollout_schema import RolloutConfig
from megatron_aligndistil.config.rollout_sizes import RolloutSizes
from megatron_aligndistil.errors import ConfigError
from tests.unit.config.test_checks import paths, run

__all__ = ["paths"]  # a fixture

# (recipe, overrides, what the line begins with, what it must also say)
REFUSED = [
    ("aligndistil", "model.rollout.max_new_tokens=8", "model.rollout: ", "source=dataset"),
    ("aligndistil", "model.aligndistil.source=both", "model.aligndistil.source=both: ", "dataset, rollout"),
    ("ppo", "model.rollout.engine=sglang", "model.rollout.engine=sglang: ", "hf, vllm"),
    ("ppo", "model.rollout.prompts_per_rollout=100", "model.rollout.prompts_per_rollout=100: ", "multiple of"),
    (
        "token_pg",
        "model.rollout.samples_per_prompt=3",
        "model.rollout.samples_per_prompt=3: ",
        "model.global_batch_size=128",
    ),
    ("ppo", "model.rollout.max_off_policy_steps=3", "model.rollout.max_off_policy_steps=3: ", "up to 7 steps old"),
    ("ppo", "model.rollout.max_new_tokens=1025", "model.rollout.max_new_tokens=1025: ", "encoder_seq_length=2048"),
    ("ppo", "model.rollout.max_new_tokens=0", "model.rollout.max_new_tokens=0: ", "at least 1"),
    ("ppo", "model.rollout.temperature=-1", "model.rollout.temperature=-1.0: ", "0 or more"),
    ("ppo", "model.rollout.top_p=0", "model.rollout.top_p=0.0: ", "(0, 1]"),
    ("ppo", "model.rollout.top_p=1.5", "model.rollout.top_p=1.5: ", "(0, 1]"),
    ("ppo", "model.rollout.max_logprob_gap=0", "model.rollout.max_logprob_gap=0.0: ", "greater than 0"),
    ("ppo", "model.data.responses=both", "model.data.responses=both: ", "remove"),
    ("ppo", "model.reward.source=function", "model.reward.source=function: ", "model.reward.function"),
    ("ppo", "model.reward.function=a:b", "model.reward.function=a:b: ", "source=model"),
    ("ppo", "model.reward.source=magic", "model.reward.source=magic: ", "contrastive"),
    ("ppo", "model.ppo.kl_target=0", "model.ppo.kl_target=0.0: ", "greater than 0"),
    ("ppo", "model.ppo.kl_target=0.1 model.ppo.kl_horizon=204", "model.ppo.kl_horizon=204: ", "above 204"),
    ("ppo", "model.ppo.critic.optim.lr=-1", "model.ppo.critic.optim.lr=-1.0: ", "0 or more"),
    (
        "ppo",
        "model.ppo.critic.optim.sched.warmup_steps=4",
        "model.ppo.critic.optim.sched.warmup_steps=4: ",
        "model.ppo.critic.optim.sched.warmup_ratio=null",
    ),
    ("rto", "model.rto.dpo_path=/nowhere", "model.rto.dpo_path=/nowhere: ", "no such file"),
    (
        "ppo",
        "model.rollout.engine=vllm model.rollout.vllm.base_url=http://x:1 model.rollout.vllm.port=2",
        "model.rollout.vllm.port=2: ",
        "remove one",
    ),
    ("ppo", "model.rollout.vllm.base_url=http://x:1", "model.rollout.vllm.base_url=http://x:1: ", "engine=vllm"),
    ("ppo", "model.rollout.vllm.dtype=int8", "model.rollout.vllm.dtype=int8: ", "bfloat16"),
]


@pytest.mark.parametrize(("name", "overrides", "start", "remedy"), REFUSED)
def test_a_bad_rollout_is_refused_in_one_line(paths, name, overrides, start, remedy):
    with pytest.raises(ConfigError) as refusal:
        checks.check(run(paths, name, *overrides.split()))
    line = str(refusal.value)
    assert line.startswith(start)
    assert remedy in line
    assert "\n" not in line


@pytest.mark.parametrize(
    "overrides",
    [
        "model.rollout.max_off_policy_steps=7",
        "model.rollout.samples_per_prompt=4 model.rollout.prompts_per_rollout=32",
        "model.rollout.engine=vllm model.rollout.vllm.base_url=http://x:1",
    ],
)
def test_good_rollouts_pass(paths, overrides):
    checks.check(run(paths, "ppo", *overrides.split()))


@pytest.mark.parametrize(
    ("prompts", "samples", "epochs", "batch", "sync_every", "steps", "oldest"),
    [
        (8, 1, 1, 8, 1, 1, 0),  # strictly on-policy
        (16, 1, 1, 8, 1, 2, 1),
        (16, 2, 3, 8, 1, 12, 11),
        (8, 1, 1, 8, 4, 1, 3),
        (16, 1, 1, 8, 3, 2, 3),
        (None, 4, 1, 8, 1, 1, 0),
    ],
)
def test_sizes_are_what_a_run_does(prompts, samples, epochs, batch, sync_every, steps, oldest):
    config = RolloutConfig(
        prompts_per_rollout=prompts, samples_per_prompt=samples, epochs_per_rollout=epochs, sync_every=sync_every
    )
    sizes = RolloutSizes.of(config, batch)
    assert sizes.steps == steps
    # Played through, as the source does it.
    weights, worst = -(10**9), 0
    for step in range(200):
        if step % sizes.steps == 0 and step - weights >= sync_every:
            weights = step
        worst = max(worst, step - weights)
    assert sizes.max_off_policy_steps == worst == oldest
