"""NeMo-Aligner's keys and ours: what each becomes, or why it is left out. ``nemo_translation`` applies it.

``trainer.<section>`` stands for the section of the program: trainer.sft, trainer.rm, trainer.dpo, trainer.kto,
trainer.ppo. A key that ends with ``.*`` stands for all below it. Of several rows for one of our keys the last wins.
"""

from __future__ import annotations

from megatron_aligndistil.config import nemo_conversions as convert
from megatron_aligndistil.config.nemo_algorithm_keys import PPO, PREFERENCES, REWARD_MODEL
from megatron_aligndistil.config.nemo_rows import SECTION, Row, decides, holds, left_out, moved, same

_CHECKPOINTS = "exp_manager.checkpoint_callback_params."
_TRAIN, _VALIDATION = "model.data.train_ds.", "model.data.validation_ds."
_NEWEST = "the newest are kept, unless checkpoint_callback_params.monitor names a metric of ours (loss for val_loss)"
_SETS = (_TRAIN, _VALIDATION)
_TEMPLATE = "rows are messages, or prompt and completion, written by the tokenizer's chat template"
_SPEED = "about speed or memory in NeMo only"

TRAINER = (
    moved("trainer.num_nodes"),
    moved("trainer.devices", by=convert.devices),
    moved("trainer.accelerator", by=convert.accelerator),
    moved("trainer.precision", by=convert.precision, note="bf16 and bf16-mixed → bf16-mixed, 32 → 32"),
    moved(f"{SECTION}.max_epochs", "trainer.max_epochs"),
    moved(
        f"{SECTION}.max_steps",
        "trainer.max_steps",
        convert.steps,
        "optimizer steps; PPO's are rollouts, num_rollout_samples / global_batch_size steps each. NeMo-Aligner stops "
        "at max_epochs where that comes first, here max_steps alone counts",
    ),
    moved(
        f"{SECTION}.val_check_interval",
        "trainer.val_check_interval",
        convert.validation_interval,
        "steps as above; no equal: a share of an epoch",
    ),
    moved(
        f"{SECTION}.limit_val_batches",
        "trainer.limit_val_batches",
        convert.validation_batches,
        "1.0 → -1, all; no equal: a share of the set; 0 → no validation",
    ),
    moved(f"{SECTION}.gradient_clip_val", "trainer.gradient_clip_val", convert.clipping, "null → 0, no clipping"),
    moved(f"{SECTION}.run_init_validation", "trainer.val_before_training"),
    moved(
        f"{SECTION}.save_interval",
        f"{_CHECKPOINTS}every_n_train_steps",
        convert.save_interval,
        "steps as above; 0 → no checkpoint, not even at the end",
    ),
    holds(f"{SECTION}.", "limit_train_batches", 1, None, otherwise="an epoch is the whole data set"),
    moved(f"{SECTION}.train_random_sampler", "model.data.shuffle"),
    holds(f"{SECTION}.", "val_random_sampler", False, otherwise="validation keeps the order of the file"),
    left_out(f"{SECTION}.", "inference_metrics.*", "metrics of one's own: see aligndistil analyze"),
    left_out(
        "trainer.",
        "max_epochs max_steps logger enable_checkpointing use_distributed_sampler",
        f"NeMo-Aligner's own wiring; {SECTION} has the values",
    ),
    left_out("trainer.", "log_every_n_steps", "NeMo-Aligner does not read it, and logs every step, as here"),
    holds("trainer.", "max_time", None, otherwise="there is no limit of time; a signal ends a run with a checkpoint"),
)

EXP_MANAGER = (
    *same("exp_manager.", "explicit_log_dir", "name", "resume_if_exists"),
    *same("exp_manager.", "exp_dir", "version", by=convert.part_of_folder),
    *same("exp_manager.", "resume_ignore_no_checkpoint", "create_tensorboard_logger", "create_wandb_logger"),
    *same("exp_manager.", "create_checkpoint_callback"),
    *same("exp_manager.wandb_logger_kwargs.", "project", "name", "entity", "group", by=convert.wandb),
    *same("exp_manager.wandb_logger_kwargs.", "tags", "notes", "id", by=convert.wandb),
    left_out("exp_manager.", "wandb_logger_kwargs.*", "not an argument of wandb.init that NeMo and we share"),
    left_out(
        "exp_manager.", "use_datetime_version", "a folder is named by the date only where exp_manager.version says so"
    ),
    holds("exp_manager.", "resume_from_checkpoint", None, otherwise="runs go on from the newest of their own"),
    holds("exp_manager.", "max_time_per_run", None, otherwise="a signal ends a run with a checkpoint"),
    moved(f"{_CHECKPOINTS}every_n_train_steps"),
    moved(f"{_CHECKPOINTS}save_top_k", note=_NEWEST),
    moved(f"{_CHECKPOINTS}async_save"),
    moved(
        f"{_CHECKPOINTS}save_nemo_on_train_end",
        f"{_CHECKPOINTS}save_on_train_end",
        convert.save_at_end,
        "our checkpoint is the model; false only leaves out the .nemo file",
    ),
    left_out(_CHECKPOINTS, "monitor mode save_best_model", _NEWEST),
    holds(_CHECKPOINTS, "save_last", True, otherwise="the newest checkpoint is always kept"),
    holds(_CHECKPOINTS, "save_weights_only", False, otherwise="checkpoints hold all that resuming needs"),
    left_out(_CHECKPOINTS, "filename prefix postfix auto_insert_metric_name verbose", "checkpoints are step_<number>"),
    left_out(_CHECKPOINTS, "dirpath", "checkpoints are in <log dir>/checkpoints"),
    holds(_CHECKPOINTS, "every_n_epochs", None, 1, otherwise="checkpoints are counted in steps: every_n_train_steps"),
    holds(_CHECKPOINTS, "train_time_interval", None, otherwise="checkpoints are counted in steps: every_n_train_steps"),
    left_out(_CHECKPOINTS, "model_parallel_size", "a checkpoint has no layout"),
    left_out(_CHECKPOINTS, "always_save_nemo", "every checkpoint is a model that training and convert read"),
)

MODEL = (
    moved(
        "pretrained_checkpoint.restore_from_path",
        "model.restore_from_path",
        convert.model_path,
        "no equal: .nemo files",
    ),
    moved("model.restore_from_path", by=convert.model_path, note="no equal: .nemo files"),
    *same("model.", "seed", "micro_batch_size", "global_batch_size", "encoder_seq_length", "transformer_engine"),
    *same("model.", "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
    *same("model.", "virtual_pipeline_model_parallel_size", "sequence_parallel", "make_vocab_size_divisible_by"),
    *same("model.", "activations_checkpoint_granularity", "activations_checkpoint_method"),
    *same("model.", "activations_checkpoint_num_layers", "megatron_amp_O2"),
    holds("model.", "mcore_gpt", True, otherwise="every model is Megatron-Core's"),
    holds("model.", "hidden_dropout attention_dropout ffn_dropout", 0, otherwise="there is no dropout"),
    holds("model.", "seq_len_interpolation_factor resume_from_checkpoint", None, otherwise="the model's own is used"),
    left_out("model.", "answer_only_loss", "only response tokens count, as in NeMo-Aligner, which does not read it"),
    left_out("model.", "max_position_embeddings share_embeddings_and_output_weights", "part of the model"),
    left_out("model.", "precision", "trainer.precision says it"),
    left_out("", "precision", "trainer.precision says it"),
    left_out("", "name", "exp_manager.name says it"),
    decides("defaults", convert.inherited, "files that it inherits from are not read; translate what --cfg job prints"),
    left_out("model.", "save_nemo_on_validation_end", "every checkpoint is a model that training and convert read"),
    left_out("model.", "overwrite_base_config.*", "no configuration comes with a model"),
    left_out("model.", "steerlm2.* inference.*", "of other programs than the one that this becomes"),
    left_out("model.", "ub_tp_comm_overlap_cfg.* use_flash_attention sync_batch_comm", _SPEED),
    left_out("model.", "gradient_as_bucket_view activations_checkpoint_layers_per_pipeline", _SPEED),
    moved("model.peft.peft_scheme", by=convert.peft_scheme, note="none → null"),
    moved("model.peft.restore_from_path", by=convert.adapter_path, note="no equal: .nemo files"),
    *same("model.peft.lora_tuning.", "target_modules", "adapter_dim", "alpha", by=convert.of_adapter),
    holds("model.peft.lora_tuning.", "adapter_dropout", 0, otherwise="adapters have no dropout"),
    left_out(
        "model.peft.lora_tuning.", "column_init_method row_init_method", "adapters start as PEFT's do: uniform, zero"
    ),
    holds("model.peft.lora_tuning.", "layer_selection", None, otherwise="every layer has adapters"),
    holds("model.peft.lora_tuning.", "weight_tying", False, otherwise="every layer has adapters of its own"),
    left_out("model.peft.lora_tuning.", "position_embedding_strategy", "of weight_tying only"),
    holds("model.peft.restore_from_ckpt.", "checkpoint_dir checkpoint_name", None, otherwise="give restore_from_path"),
)

OPTIMIZER = (
    moved(
        "model.optim.name", by=convert.optimizer, note="fused_adam, adamw → adam; no equal: adam with weight decay (L2)"
    ),
    *same("model.optim.", "lr", "weight_decay", "betas", "eps"),
    moved("model.optim.sched.name", by=convert.schedule),
    moved("model.optim.sched.warmup_steps", by=convert.warmup, note="optimizer steps; the recipe's warmup_ratio goes"),
    *same("model.optim.sched.", "warmup_ratio", "min_lr"),
    holds(
        "model.optim.sched.",
        "constant_steps constant_ratio",
        None,
        0,
        otherwise="the decay takes all steps, NeMo's ends so many earlier and holds min_lr",
    ),
    holds("model.optim.sched.", "max_steps", None, otherwise="the schedule is as long as the run"),
    left_out("model.optim.", "bucket_cap_mb overlap_grad_sync overlap_param_sync contiguous_grad_buffer", _SPEED),
    left_out("model.optim.", "contiguous_param_buffer grad_sync_dtype param_sync_dtype dtype", _SPEED),
)

DATA = (
    decides("model.data.data_prefix", convert.undivided_data, "no equal: one list, which splits_string divides"),
    moved("model.data.data_prefix.train", by=convert.data_files, note="no equal: blends by weights"),
    moved("model.data.data_prefix.validation", by=convert.data_files),
    left_out("model.data.data_prefix.", "test", "no program reads it"),
    left_out("model.data.data_prefix.", "*", "one validation set"),
    holds(
        "model.data.",
        "data_impl",
        "json",
        "jsonl",
        otherwise="data are JSONL or Parquet files; packing is model.data.batching",
    ),
    moved("model.data.seq_length", "model.encoder_seq_length"),
    moved(f"{_TRAIN}max_seq_length", "model.encoder_seq_length"),
    moved(f"{_TRAIN}global_batch_size", "model.global_batch_size"),
    moved(f"{_TRAIN}micro_batch_size", "model.micro_batch_size"),
    moved(f"{_TRAIN}file_path", "model.data.data_prefix.train", convert.data_files),
    moved(f"{_VALIDATION}file_path", "model.data.data_prefix.validation", convert.data_files),
    left_out(_TRAIN, "shuffle", "NeMo-Aligner does not read it, and always shuffles, as here"),
    *(left_out(of, "file_names concat_sampling_probabilities", "NeMo-Aligner reads file_path") for of in _SETS),
    *(holds(of, "packed_sequence", False, otherwise="packing is model.data.batching=packed") for of in _SETS),
    left_out(_TRAIN, "seed packed_sequence_return_cu_seqlen", "model.seed is the one; packed documents never mix"),
    holds(_TRAIN, "drop_last", True, otherwise="batches are whole"),
    left_out(_VALIDATION, "drop_last", "validation takes every example"),
    *(holds(of, "min_seq_length", None, 0, 1, otherwise="no row is too short") for of in _SETS),
    *(
        left_out(of, "label_key prompt_template add_bos add_eos add_sep truncation_field truncation_method", _TEMPLATE)
        for of in _SETS
    ),
    *(left_out(of, "memmap_workers index_mapping_dir hf_dataset", "rows are read once") for of in _SETS),
    left_out(
        _VALIDATION, "max_seq_length global_batch_size micro_batch_size shuffle output_original_text", "as in training"
    ),
    left_out("model.data.", "chat chat_prompt_tokens.*", _TEMPLATE),
    holds("model.data.", "sample", False, otherwise="epochs repeat the data, shuffled anew: trainer.max_epochs"),
    holds("model.data.", "splits_string", None, otherwise="name the files of each: model.data.data_prefix"),
    left_out("model.data.", "num_workers", "of the loader in NeMo; here those that tokenize"),
    left_out("model.data.", "index_mapping_dir skip_warmup dataloader_type", "rows are tokenized once, and cached"),
    holds("model.data.", "reset_position_ids reset_attention_mask", False, otherwise="an example is one document"),
    holds("model.data.", "eod_mask_loss", False, otherwise="EOS is learnt"),
    holds("model.data.", "append_eod", True, otherwise="responses end with EOS"),
    holds("model.data.", "apply_ftfy", False, otherwise="text is taken as it is"),
    left_out("model.data.", "validation_drop_last", "validation takes every example"),
    left_out("model.data.", "pad_length_to_multiple_of", "batches are padded as the layout needs it"),
    left_out("model.data.", "default_chosen_reward default_rejected_reward", "of RPO only"),
)

TABLE: dict[str, tuple[Row, ...]] = {
    "Trainer": TRAINER,
    "exp_manager": EXP_MANAGER,
    "Model": MODEL,
    "Optimizer": OPTIMIZER,
    "Data": DATA,
    "DPO, IPO and KTO": PREFERENCES,
    "Reward models": REWARD_MODEL,
    "PPO": PPO,
}


def markdown() -> str:
    """The table as ``docs/nemo.md`` shows it."""
    lines = []
    for title, rows in TABLE.items():
        lines += [f"### {title}", "", "| NeMo-Aligner | here | |", "|---|---|---|"]
        for row in rows:
            names = ", ".join(f"`{name}`" for name in row.nemo)
            ours = "the same" if row.nemo == (row.ours,) else f"`{row.ours}`" if row.ours else ""
            lines.append(f"| {names} | {ours} | {row.note} |")
        lines.append("")
    return "\n".join(lines)
