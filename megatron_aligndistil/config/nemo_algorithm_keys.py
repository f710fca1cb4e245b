"""The part of the table of NeMo-Aligner's keys that is about single algorithms; see ``nemo_keys``."""

from __future__ import annotations

from megatron_aligndistil.config import nemo_conversions as convert
from megatron_aligndistil.config.nemo_rows import decides, holds, left_out, moved

_MEAN = "false: so here; of ipo model.ipo.normalize_by_length; else no equal"
_PREFERENCE = "there is no such term in the loss"

_BOTH = tuple(
    row
    for of in ("model.dpo.", "model.kto.")
    for row in (
        decides(f"{of}ref_policy_kl_penalty", convert.kl_penalty, "→ model.{dpo,ipo,kto}.beta"),
        decides(f"{of}preference_average_log_probs", convert.mean_log_probs, _MEAN),
        holds(of, "preference_loss_weight", 1, otherwise="the loss has no weight"),
        holds(of, "sft_loss_weight", 0, otherwise=_PREFERENCE),
        left_out(of, "sft_average_log_probs", "of the SFT term only"),
        left_out(of, "log_prob_forward_micro_batch_size", "the reference takes the policy's micro-batches"),
    )
)
PREFERENCES = (
    *_BOTH,
    left_out("model.dpo.", "preference_loss", "dpo → recipe dpo, ipo → recipe ipo; the others have no counterpart"),
    left_out("model.dpo.", "gt_reward_scale", "of RPO only"),
    moved("model.kto.desirable_loss_weight", "model.kto.desirable_weight"),
    moved("model.kto.undesirable_loss_weight", "model.kto.undesirable_weight"),
)

REWARD_MODEL = (
    left_out("model.", "reward_model_type", "binary_ranking → recipe reward_model; the others have no counterpart"),
    left_out("model.", "regression.*", "of regression reward models only"),
    holds("model.", "output_sequence", False, otherwise="a response has one reward"),
    holds("model.", "use_avg_pool", False, otherwise="the reward is read at the last token"),
    left_out("model.", "force_head_dtype", "the head has the weights' precision, its output is float32"),
    left_out("model.", "forward_micro_batch_size", "of NeMo's inference; here model.rollout.forward_micro_batch_size"),
)

_SAMPLING = "model.ppo.sampling_params."

PPO = (
    moved("trainer.ppo.initial_policy_kl_penalty", "model.ppo.kl_coef"),
    holds(
        "trainer.ppo.", "use_absolute_kl", False, otherwise="the penalty is on the log-ratio itself, not its magnitude"
    ),
    moved("trainer.ppo.discount_factor", "model.ppo.discount"),
    moved("trainer.ppo.gae_lambda", "model.ppo.gae_lambda"),
    moved("trainer.ppo.normalize_advantages", "model.ppo.whiten_advantages"),
    holds("trainer.ppo.", "critic_warmup_steps", 0, otherwise="policy and critic are trained together from the start"),
    left_out("trainer.ppo.", "rollout_batch_seq_length", "a micro-batch is as long as its longest row"),
    left_out(
        "trainer.ppo.", "trt_llm.* trt_model_dir", "transformers or vLLM draw the responses: model.rollout.engine"
    ),
    left_out("trainer.ppo.", "batch_iterator.* model_gbs model_mbs", "NeMo-Aligner's own wiring"),
    left_out("", "remote_critic_rm.*", "no servers: model.reward.path and model.ppo.critic.path are part of the run"),
    moved("model.ppo.num_rollout_samples", "model.rollout.prompts_per_rollout"),
    moved("model.ppo.rollout_micro_batch_size", "model.rollout.hf_batch_size"),
    moved("model.ppo.forward_micro_batch_size", "model.rollout.forward_micro_batch_size"),
    left_out("model.ppo.", "val_rollout_micro_batch_size num_val_samples", "as in training; trainer.limit_val_batches"),
    left_out("model.ppo.", "offload_adam_states trt_llm.*", "about memory in NeMo only"),
    holds("model.ppo.", "entropy_bonus", 0, otherwise=_PREFERENCE),
    moved("model.ppo.ratio_eps", "model.ppo.clip"),
    moved(f"{_SAMPLING}temperature", "model.rollout.temperature", convert.temperature, "0 with use_greedy"),
    left_out(_SAMPLING, "use_greedy", "temperature says it"),
    moved(f"{_SAMPLING}top_k", "model.rollout.top_k"),
    moved(f"{_SAMPLING}top_p", "model.rollout.top_p"),
    holds(_SAMPLING, "repetition_penalty", 1, otherwise="tokens are drawn from the policy itself"),
    holds(_SAMPLING, "add_BOS", False, otherwise="the chat template says it"),
    left_out(_SAMPLING, "all_probs compute_logprob", "log-probs are the trainer's"),
    left_out(_SAMPLING, "end_strings", "a response ends with the tokenizer's EOS"),
    moved("model.ppo.length_params.max_length", "model.rollout.max_new_tokens"),
    holds("model.ppo.length_params.", "min_length", 0, 1, otherwise="a response may be short"),
)
