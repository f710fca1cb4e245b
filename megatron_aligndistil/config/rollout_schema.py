"""The typed configuration of rollouts and rewards: ``model.rollout`` and ``model.reward``; see ``schema``."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_aligndistil.config.optional import OptionalFloat, OptionalInt, OptionalStr


@dataclass(kw_only=True)
class VLLMConfig:
    """``model.rollout.vllm``: a vLLM server, started on every node, or one that runs elsewhere."""

    base_url: OptionalStr = None  # of a running server, such as http://host:8000; default: start one
    python: OptionalStr = None  # the interpreter that has vLLM; default: .venv-vllm's where there is one, else ours
    port: OptionalInt = None  # of the started server; default: a free one
    tensor_parallel_size: int = 1
    dtype: str = "bfloat16"  # bfloat16 | float32 | float16: of the engine's weights
    gpu_memory_utilization: float = 0.4
    kv_cache_gib: float = 1.0  # on a CPU
    enforce_eager: bool = True
    sleep: bool = True  # on GPUs: free the engine's memory while the policy trains
    sync_dir: OptionalStr = None  # where weights are handed over; default: /dev/shm; a server elsewhere must see it
    start_timeout_seconds: int = 600
    request_timeout_seconds: int = 600  # without an answer, before the engine counts as lost
    max_restarts: int = 3
    extra_args: list[str] = field(default_factory=list)  # more arguments of the started server


@dataclass(kw_only=True)
class RolloutConfig:
    """``model.rollout``: responses that the policy draws itself.

    One rollout phase draws prompts_per_rollout x samples_per_prompt responses, which train the policy for
    epochs_per_rollout epochs of model.global_batch_size responses a step.
    """

    engine: str = "hf"  # hf (transformers on every rank) | vllm
    prompts_per_rollout: OptionalInt = None  # default: one step's (global_batch_size / samples_per_prompt)
    samples_per_prompt: int = 1
    epochs_per_rollout: int = 1
    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    seed: OptionalInt = None  # default: model.seed
    sync_every: int = 1  # optimizer steps between new weights for the engine, which gets them before a rollout only
    max_off_policy_steps: OptionalInt = None  # refuse settings whose responses may be drawn by older weights
    sync_bucket_mib: int = 256
    probe_prompts: int = 4  # whose log-probs engine and trainer compare after a sync
    max_logprob_gap: float = 0.1  # mean nats a token between them; beyond it the run stops
    hf_batch_size: int = 16  # responses that a rank's transformers model draws at a time
    forward_micro_batch_size: OptionalInt = None  # of the passes that score a rollout; default: micro_batch_size
    vllm: VLLMConfig = field(default_factory=VLLMConfig)


@dataclass(kw_only=True)
class RewardConfig:
    """``model.reward``: what PPO and RTO give a whole response."""

    # model (a reward model) | contrastive (DPO, reverse DPO) | vanilla (DPO, initial model) | function
    source: str = "model"
    path: OptionalStr = None  # the reward model
    dpo_path: OptionalStr = None
    reverse_dpo_path: OptionalStr = None
    initial_path: OptionalStr = None  # vanilla's reference; default: restore_from_path
    beta0: float = 0.1  # of the DPO rewards
    function: OptionalStr = None  # module:name of f(prompts, responses) -> one number a response, texts in lists
    clip: OptionalFloat = None  # rewards are cut to [-clip, clip]
