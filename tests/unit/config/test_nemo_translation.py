"""NeMo-Aligner's files become ours: units, meanings, and an account of every key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from megatron_aligndistil.config import checks, compose, nemo_keys, nemo_translation
from megatron_aligndistil.config.nemo_translation import Translation, translate
from megatron_aligndistil.config.schema import DPORunConfig, IPORunConfig, KTORunConfig, PPORunConfig
from megatron_aligndistil.errors import ConfigError

DOCS = Path(__file__).parents[3] / "docs" / "nemo.md"
# What every program's file has.
COMMON = """
trainer:
  num_nodes: 1
  devices: 2
  precision: bf16
  SECTION:
    max_epochs: 2
    max_steps: -1
    val_check_interval: 20
    save_interval: 40
    limit_val_batches: 1.0
    gradient_clip_val: null
  max_epochs: ${.SECTION.max_epochs}
exp_manager:
  explicit_log_dir: null
  name: mine
  resume_if_exists: true
  create_wandb_logger: true
  wandb_logger_kwargs: {project: p, name: n, log_model: true}
  checkpoint_callback_params:
    monitor: val_loss
    save_nemo_on_train_end: true
    model_parallel_size: ${multiply:${model.tensor_model_parallel_size}, 2}
pretrained_checkpoint: {restore_from_path: PATH}
model:
  micro_batch_size: 2
  global_batch_size: 16
  tensor_model_parallel_size: 2
  encoder_seq_length: 512
  megatron_amp_O2: true
  optim:
    name: distributed_fused_adam
    lr: 9e-6
    weight_decay: 0.1
    betas: [0.9, 0.98]
    bucket_cap_mb: 200
    sched: {name: CosineAnnealing, warmup_steps: 10, min_lr: 9e-7}
  data:
    data_impl: jsonl
    data_prefix: {train: [DATA], validation: [DATA], test: [DATA]}
    seq_length: ${model.encoder_seq_length}
"""
PPO = """
trainer:
  ppo:
    initial_policy_kl_penalty: 0.02
    use_absolute_kl: false
    discount_factor: 0.9
    gae_lambda: 0.8
    normalize_advantages: false
    max_steps: 10
    trt_llm: {enable: false, seed: 3}
remote_critic_rm: {critic: {ip: localhost}}
model:
  ppo:
    num_rollout_samples: 64
    rollout_micro_batch_size: 8
    forward_micro_batch_size: ${.rollout_micro_batch_size}
    ratio_eps: 0.1
    entropy_bonus: 0.0
    sampling_params: {use_greedy: false, temperature: 0.7, top_k: 5, top_p: 0.9}
    length_params: {max_length: "${int_div:${model.encoder_seq_length}, 4}", min_length: 1}
"""
SFT = """
trainer:
  sft: {max_epochs: 1, max_steps: 30, val_check_interval: 0, limit_val_batches: 3, save_interval: 0}
model:
  global_batch_size: ${.data.train_ds.global_batch_size}
  restore_from_path: ???
  optim: {name: fused_adam, lr: 1e-5}
  peft: {peft_scheme: lora, lora_tuning: {target_modules: [all], adapter_dim: 8, adapter_dropout: 0.1}}
  data:
    train_ds: {file_path: DATA, global_batch_size: 32, micro_batch_size: 1, max_seq_length: 256, shuffle: true}
    validation_ds: {file_path: null, micro_batch_size: 1}
"""


class Files:
    """Writes NeMo-Aligner's files into a folder with a model and data to name, and translates them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "model").mkdir()
        (folder / "data.jsonl").touch()

    def translate(self, section: str, *more: str, algorithm: str | None = None) -> Translation:
        """COMMON with ``more`` merged into it; an empty ``section`` leaves it out."""
        merged = {}
        names = {"SECTION": section, "PATH": str(self.folder / "model"), "DATA": str(self.folder / "data.jsonl")}
        for text in ([COMMON] if section else []) + list(more):
            merged = merge(merged, yaml.safe_load(re.sub("SECTION|PATH|DATA", lambda word: names[word[0]], text)))
        path = self.folder / "old.yaml"
        path.write_text(yaml.safe_dump(merged))
        return translate(path, algorithm)

    def loaded(self, made: Translation, *overrides: str):
        """What our program makes of the translation, checks included."""
        (self.folder / "new.yaml").write_text(made.yaml())
        config = compose.load_config("new", overrides, self.folder)
        checks.check(config)
        return config


def merge(below: dict, above: dict) -> dict:
    both = [key for key in below if isinstance(below[key], dict) and isinstance(above.get(key), dict)]
    return {**below, **above, **{key: merge(below[key], above[key]) for key in both}}


def dotted(node: dict, prefix: str = "") -> set[str]:
    below = {key: value for key, value in node.items() if isinstance(value, dict)}
    return {f"{prefix}{key}" for key in node}.union(*(dotted(value, f"{prefix}{key}.") for key, value in below.items()))


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def reasons(items: list[tuple[str, str]]) -> dict[str, str]:
    return {item.partition("=")[0].partition(" ")[0]: reason for item, reason in items}


def test_dpo(files):
    made = files.translate(
        "dpo", "model: {dpo: {ref_policy_kl_penalty: 0.2, sft_loss_weight: 0, preference_loss: dpo}}"
    )
    assert not made.unset and not made.refused
    config = files.loaded(made)
    assert isinstance(config, DPORunConfig) and config.algorithm == "dpo"
    trainer, model, manager = config.trainer, config.model, config.exp_manager
    assert (trainer.devices, trainer.precision, trainer.max_epochs, trainer.max_steps) == (2, "bf16-mixed", 2, -1)
    assert (trainer.val_check_interval, trainer.limit_val_batches, trainer.gradient_clip_val) == (20, -1, 0)
    assert (model.dpo.beta, model.micro_batch_size, model.global_batch_size) == (0.2, 2, 16)
    assert (model.encoder_seq_length, model.data.max_prompt_length, model.data.long_response) == (512, 511, "drop")
    assert (model.optim.lr, model.optim.betas, model.optim.weight_decay) == (9e-6, [0.9, 0.98], 0.1)
    sched = model.optim.sched
    assert (sched.warmup_steps, sched.warmup_ratio, sched.min_lr) == (10, None, 9e-7)
    params = manager.checkpoint_callback_params
    # NeMo's defaults, where its file leaves a key out and ours has another.
    assert (params.every_n_train_steps, params.save_top_k, manager.resume_ignore_no_checkpoint) == (40, 3, False)
    assert manager.wandb_logger_kwargs == {"project": "p", "name": "n"}
    assert "log_model" in str(made.left_out) and "monitor=val_loss" in str(made.left_out)
    assert reasons(made.no_equal) == {}


def test_ipo_takes_its_unit_from_the_file(files):
    summed = files.translate("dpo", "model: {dpo: {ref_policy_kl_penalty: 0.3, preference_loss: ipo}}")
    config = files.loaded(summed)
    assert isinstance(config, IPORunConfig)
    assert (config.model.ipo.beta, config.model.ipo.normalize_by_length) == (0.3, False)
    mean = "model: {dpo: {preference_loss: ipo, preference_average_log_probs: true}}"
    assert files.loaded(files.translate("dpo", mean)).model.ipo.normalize_by_length is True


def test_kto(files):
    section = "{ref_policy_kl_penalty: 0.3, desirable_loss_weight: 2.0, undesirable_loss_weight: 0.5}"
    config = files.loaded(files.translate("kto", f"model: {{kto: {section}}}"))
    assert isinstance(config, KTORunConfig)
    assert (config.model.kto.beta, config.model.kto.desirable_weight, config.model.kto.undesirable_weight) == (
        0.3,
        2,
        0.5,
    )


def test_reward_model(files):
    made = files.translate("rm", "model: {reward_model_type: binary_ranking, regression: {num_attributes: 1}}")
    assert files.loaded(made).algorithm == "reward_model"
    with pytest.raises(ConfigError, match=r"model.reward_model_type=regression: reward models here"):
        files.translate("rm", "model: {reward_model_type: regression}")


def test_ppo_counts_rollouts_and_we_optimizer_steps(files):
    made = files.translate("ppo", PPO)
    assert made.unset == ["model.reward.path"]
    config = files.loaded(made, f"model.reward.path={files.folder / 'model'}")
    assert isinstance(config, PPORunConfig)
    # 64 responses a rollout, 16 a step.
    assert (config.trainer.max_steps, config.trainer.val_check_interval) == (40, 80)
    assert config.exp_manager.checkpoint_callback_params.every_n_train_steps == 160
    ppo, rollout = config.model.ppo, config.model.rollout
    assert (ppo.kl_coef, ppo.discount, ppo.gae_lambda, ppo.whiten_advantages, ppo.clip) == (0.02, 0.9, 0.8, False, 0.1)
    assert (rollout.prompts_per_rollout, rollout.hf_batch_size, rollout.forward_micro_batch_size) == (64, 8, 8)
    assert (rollout.temperature, rollout.top_k, rollout.top_p, rollout.max_new_tokens) == (0.7, 5, 0.9, 128)
    assert config.model.data.max_prompt_length == 512 - 128
    uneven = files.translate("ppo", PPO, "model: {ppo: {num_rollout_samples: 50}}")
    assert "counts rollouts" in reasons(uneven.no_equal)["trainer.ppo.max_steps"]


def test_sft(files):
    made = files.translate("", SFT)
    assert made.unset == ["model.restore_from_path"]
    config = files.loaded(made, f"model.restore_from_path={files.folder / 'model'}")
    model, params = config.model, config.exp_manager.checkpoint_callback_params
    assert (model.global_batch_size, model.micro_batch_size, model.encoder_seq_length) == (32, 1, 256)
    assert (config.trainer.max_steps, config.trainer.val_check_interval, config.trainer.val_after_training) == (
        30,
        0,
        False,
    )
    assert (params.every_n_train_steps, params.save_on_train_end) == (0, False)
    assert (model.optim.name, model.optim.betas) == ("adam", [0.9, 0.999])
    # Without a schedule NeMo's rate is constant.
    assert (model.optim.sched.name, model.optim.sched.warmup_steps) == ("WarmupPolicy", 0)
    assert (model.peft.peft_scheme, model.peft.lora_tuning.adapter_dim) == ("lora", 8)
    assert list(reasons(made.no_equal)) == ["model.peft.lora_tuning.adapter_dropout"]


NO_EQUAL = [
    ("trainer: {dpo: {val_check_interval: 0.1}}", "trainer.dpo.val_check_interval", "share of an epoch"),
    ("trainer: {dpo: {limit_val_batches: 0.5}}", "trainer.dpo.limit_val_batches", "share of the validation set"),
    ("trainer: {precision: 16}", "trainer.precision", "bf16-mixed and 32"),
    ("trainer: {devices: auto}", "trainer.devices", "number of processes"),
    ("model: {optim: {name: adam}}", "model.optim.name", "decoupled"),
    ("model: {optim: {sched: {name: NoamAnnealing}}}", "model.optim.sched.name", "WarmupPolicy"),
    ("model: {optim: {sched: {constant_steps: 5}}}", "model.optim.sched.constant_steps", "min_lr"),
    ("model: {dpo: {sft_loss_weight: 0.1}}", "model.dpo.sft_loss_weight", "no such term"),
    ("model: {dpo: {preference_average_log_probs: true}}", "model.dpo.preference_average_log_probs", "sums"),
    ("pretrained_checkpoint: {restore_from_path: a.nemo}", "pretrained_checkpoint.restore_from_path", "Hugging Face"),
    ("model: {data: {data_prefix: {train: [0.3, a, 0.7, b]}}}", "model.data.data_prefix.train", "blend"),
    ("model: {frobnicate: 3}", "model.frobnicate", "unknown"),
    ("model: {seed: '${nowhere}'}", "model.seed", "cannot be resolved (Interpolation key 'nowhere' not found)"),
    ("model: {pipeline_model_parallel_size: '${oc.nothing:1}'}", "model.pipeline_model_parallel_size", "be resolved"),
    ("model: {context_parallel_size: '${multiply:a,2.5}'}", "model.context_parallel_size", "cannot be resolved"),
    ("model: {micro_batch_size: many}", "model.micro_batch_size", "wrong type; expected an integer"),
    ("defaults: [gpt_dpo]", "defaults", "--cfg job"),
    ("exp_manager: {explicit_log_dir: a, version: v}", "exp_manager.version", "ignores it"),
]


def test_what_has_no_equal_is_named_with_its_reason(files):
    made = files.translate("dpo", *(more for more, _, _ in NO_EQUAL), "model: {tensor_model_parallel_size: 1}")
    found = reasons(made.no_equal)
    assert set(found) == {key for _, key, _ in NO_EQUAL}
    for _, key, reason in NO_EQUAL:
        assert reason in found[key]
        assert any(line.startswith("no equal: ") and key in line and reason in line for line in made.account())
    # Whatever is left loads.
    assert made.unset == ["model.restore_from_path", "model.data.data_prefix.train"]
    files.loaded(made, f"model.restore_from_path={files.folder}", "model.data.data_prefix.train=[name]")


def test_one_list_of_data_is_not_divided(files):
    made = files.translate("dpo", "model: {data: {data_prefix: [a.jsonl]}}")
    assert "splits_string divides" in reasons(made.no_equal)["model.data.data_prefix"]
    assert made.unset == ["model.data.data_prefix.train", "model.data.data_prefix.validation"]


def test_what_our_checks_refuse_stays_and_is_listed(files):
    made = files.translate("dpo", "model: {tensor_model_parallel_size: 4, megatron_amp_O2: false}")
    assert [line.partition(":")[0] for line in made.refused] == [
        "trainer.num_nodes=1 x trainer.devices=2",
        "model.megatron_amp_O2=false",
    ]
    assert made.settings["model.megatron_amp_O2"] is False
    with pytest.raises(ConfigError, match=re.escape(made.refused[0])):
        files.loaded(made)


def test_a_named_recipe_takes_the_keys_that_it_has(files):
    made = files.translate("dpo", "model: {dpo: {ref_policy_kl_penalty: 0.2}}", algorithm="simpo")
    assert reasons(made.no_equal) == {"model.dpo.ref_policy_kl_penalty": "simpo has no such coefficient"}
    assert files.loaded(made).algorithm == "simpo"
    taught = files.translate("dpo", algorithm="aligndistil")
    assert taught.unset == ["model.aligndistil.dpo_path"]
    assert "needs model.aligndistil.reverse_dpo_path" in taught.refused[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer: {spin: {max_epochs: 1}}", r"trainer.spin has no counterpart here; give the recipe"),
        ("model: {seed: 1}", r"no section such as trainer.dpo"),
        ("trainer: {ppo: {max_steps: 3}}", r"no model.ppo: a critic's file"),
        (
            "{trainer: {dpo: {a: 1}}, model: {dpo: {preference_loss: rpo_sq}}}",
            r"preference_loss=rpo_sq: of these there",
        ),
        ("trainer: {dpo: {a: 1}, sft: {a: 1}}", r"settings of two programs"),
        ("- 1", r"old.yaml: a list"),
        ("a: [", r"old.yaml:1: not valid YAML"),
    ],
)
def test_a_file_of_no_program_of_ours(text, message, tmp_path):
    path = tmp_path / "old.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        translate(path)
    assert "\n" not in str(caught.value)


def test_the_account_is_in_the_file(files):
    made = files.translate("dpo", 'model: {data: {chat_prompt_tokens: {end_of_turn: "\\n"}}}')
    text = made.yaml()
    assert "left out: " in text and r"end_of_turn='\n'" in text
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert comments == [f"# {line}" for line in made.account()]


def test_the_table_names_our_keys_and_each_of_nemos_once():
    rows = [row for rows in nemo_keys.TABLE.values() for row in rows]
    names = [name for row in rows for name in row.nemo]
    assert len(names) == len(set(names)) > 200
    keys = {key for name in compose.recipe_names() for key in dotted(yaml.safe_load(compose.describe_config(name)))}
    several = {  # by their conversions
        *(
            f"model.{of}.{name}"
            for of in ("dpo", "kto")
            for name in ("ref_policy_kl_penalty", "preference_average_log_probs")
        ),
    }
    free_form = "exp_manager.wandb_logger_kwargs."
    ours = {row.ours for row in rows if row.ours and not row.ours.startswith(free_form)}
    assert ours - several <= keys


def test_the_documentation_has_the_table():
    assert nemo_keys.markdown() in DOCS.read_text(encoding="utf-8")


def test_the_translator_knows_every_set_of_rules_that_a_configuration_is_checked_by():
    judged_later = {"RUNTIME_RULES", "MODEL_RULES"}  # on the machine, with the model
    known = {name for name in vars(nemo_translation) if name.endswith("RULES")}
    assert known == {name for name in vars(checks) if name.endswith("RULES")} - judged_later
