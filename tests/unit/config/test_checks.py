"""Every rule: what it accepts, what it refuses, and that its line names the key, the value and a remedy."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from megatron_aligndistil.config import checks, key_ranges, layout_rules, peft_rules, rollout_rules, rules
from megatron_aligndistil.config.compose import load_config, recipe_names
from megatron_aligndistil.config.schema import RunConfig
from megatron_aligndistil.errors import ConfigError

SMOLLM2 = SimpleNamespace(
    num_layers=30, num_attention_heads=9, num_query_groups=3, ffn_hidden_size=1536, max_position_embeddings=2048
)
# What a recipe leaves mandatory; "?" is replaced by ``paths``.
MANDATORY = {
    "aligndistil": ["model.aligndistil.dpo_path=?"],
    "aligndistil_on_policy": ["model.aligndistil.dpo_path=?"],
    "rto": ["model.rto.dpo_path=?"],
    "token_pg": ["model.pg.dpo_path=?", "model.pg.reverse_dpo_path=?"],
    "sentence_pg": ["model.pg.dpo_path=?", "model.pg.reverse_dpo_path=?"],
}
CPU = checks.Runtime(gpus=0, installed=frozenset())
GPUS = checks.Runtime(gpus=8, installed=frozenset({"transformer_engine", "wandb"}))


@pytest.fixture
def paths(tmp_path):
    for name in ("policy", "dpo", "reverse"):
        (tmp_path / name).mkdir()
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    return tmp_path


def run(paths, name: str, *overrides: str) -> RunConfig:
    given = [f"model.restore_from_path={paths}/policy", f"model.data.data_prefix.train=[{paths}/pairs.jsonl]"]
    given += [override.replace("?", f"{paths}/dpo") for override in MANDATORY.get(name, [])]
    if name.startswith("aligndistil"):
        given.append(f"model.aligndistil.reverse_dpo_path={paths}/reverse")
    if name in ("ppo", "rto"):
        given.append(f"model.reward.path={paths}/dpo")
    # Not through Hydra for each: it takes a tenth of a second, and these are many.
    return OmegaConf.to_object(OmegaConf.merge(base(name), OmegaConf.from_dotlist([*given, *overrides])))


@functools.cache
def base(name: str) -> DictConfig:
    return OmegaConf.structured(load_config(name, ["model.restore_from_path=?", *MANDATORY.get(name, [])]))


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_pass(paths, name):
    checks.check(run(paths, name))


ACCEPTED = [
    "trainer.devices=8 model.tensor_model_parallel_size=2 model.pipeline_model_parallel_size=2",
    "trainer.num_nodes=2 trainer.devices=8 model.tensor_model_parallel_size=4 model.sequence_parallel=true",
    "trainer.devices=2 model.pipeline_model_parallel_size=2 model.virtual_pipeline_model_parallel_size=3",
    "model.data.batching=packed model.data.pack_length=4096",
    "model.optim.sched.warmup_steps=10 model.optim.sched.warmup_ratio=null",
    "trainer.val_check_interval=5 model.data.data_prefix.validation=[org/name:test]",
    "model.activations_checkpoint_granularity=full model.activations_checkpoint_method=uniform "
    "model.activations_checkpoint_num_layers=1",
    "trainer.precision=32",
    "model.data.data_prefix.train=[HuggingFaceH4/ultrafeedback_binarized:train_prefs]",
]


@pytest.mark.parametrize("overrides", ACCEPTED)
def test_good_combinations_pass(paths, overrides):
    checks.check(run(paths, "dpo", *overrides.split()))


# (recipe, overrides, what the line begins with, what it must also say)
REFUSED = [
    ("dpo", "trainer.precision=fp16", "trainer.precision=fp16: ", "bf16-mixed, 32, 64"),
    ("dpo", "trainer.accelerator=tpu", "trainer.accelerator=tpu: ", "auto, gpu, cpu"),
    ("dpo", "model.optim.name=sgd", "model.optim.name=sgd: ", "adam, distributed_fused_adam"),
    ("dpo", "model.optim.sched.name=Linear", "model.optim.sched.name=Linear: ", "WarmupPolicy"),
    ("dpo", "model.data.batching=random", "model.data.batching=random: ", "bucketed, packed"),
    ("dpo", "model.data.long_prompt=cut", "model.data.long_prompt=cut: ", "drop, truncate_left"),
    ("dpo", "model.data.long_response=cut", "model.data.long_response=cut: ", "truncate_right, drop"),
    ("sft", "model.data.responses=all", "model.data.responses=all: ", "chosen, rejected, both"),
    (
        "dpo",
        "model.activations_checkpoint_granularity=some",
        "model.activations_checkpoint_gran",
        "null, selective, full",
    ),
    ("aligndistil", "model.aligndistil.reward=dpo", "model.aligndistil.reward=dpo: ", "contrastive, vanilla"),
    ("aligndistil", "model.aligndistil.weight=x", "model.aligndistil.weight=x: ", "adaptive, constant"),
    ("dpo", "model.micro_batch_size=0", "model.micro_batch_size=0: ", "at least 1"),
    ("dpo", "trainer.devices=-1", "trainer.devices=-1: ", "at least 1"),
    ("dpo", "trainer.max_steps=0", "trainer.max_steps=0: ", "-1 (no limit) or at least 1"),
    ("dpo", "model.optim.lr=-1e-6", "model.optim.lr=-1e-06: ", "0 or more"),
    ("dpo", "model.optim.lr=nan", "model.optim.lr=nan: ", "0 or more"),
    ("dpo", "model.optim.lr=inf", "model.optim.lr=inf: ", "0 or more"),
    ("dpo", "model.dpo.beta=0", "model.dpo.beta=0.0: ", "greater than 0"),
    ("tdpo1", "model.tdpo.beta=0", "model.tdpo.beta=0.0: ", "greater than 0"),
    ("tdpo2", "model.tdpo.beta=-1", "model.tdpo.beta=-1.0: ", "greater than 0"),
    ("tdpo2", "model.tdpo.alpha=0", "model.tdpo.alpha=0.0: ", "greater than 0"),
    ("tdpo1", "model.tdpo.reference_path=nowhere", "model.tdpo.reference_path=nowhere: ", "no such file or folder"),
    ("tdpo2", "model.data.responses=rejected", "model.data.responses=rejected: ", "tdpo2 takes both responses"),
    ("simpo", "model.simpo.beta=0", "model.simpo.beta=0.0: ", "greater than 0"),
    ("simpo", "model.simpo.gamma=-1", "model.simpo.gamma=-1.0: ", "0 or more"),
    ("simpo", "model.data.responses=both", "model.data.responses=both: ", "simpo takes both responses"),
    ("ipo", "model.ipo.beta=0", "model.ipo.beta=0.0: ", "greater than 0"),
    ("ipo", "model.ipo.reference_path=nowhere", "model.ipo.reference_path=nowhere: ", "no such file or folder"),
    (
        "ipo",
        "model.data.batching=packed model.data.pack_length=4095",
        "model.data.pack_length=4095: ",
        "raise it to 4096",
    ),
    ("kto", "model.kto.beta=0", "model.kto.beta=0.0: ", "greater than 0"),
    ("kto", "model.kto.desirable_weight=0", "model.kto.desirable_weight=0.0: ", "greater than 0"),
    ("kto", "model.kto.undesirable_weight=-1", "model.kto.undesirable_weight=-1.0: ", "greater than 0"),
    ("kto", "model.kto.reference_path=nowhere", "model.kto.reference_path=nowhere: ", "no such file or folder"),
    ("kto", "model.global_batch_size=1", "model.global_batch_size=1: ", "2 or more"),
    ("kto", "model.data.responses=both", "model.data.responses=both: ", "remove the key"),
    ("aligndistil", "model.aligndistil.epsilon=0", "model.aligndistil.epsilon=0.0: ", "greater than 0"),
    ("dpo", "model.optim.betas=[0.9]", "model.optim.betas=[0.9]: ", "two numbers"),
    ("dpo", "model.optim.betas=[0.9,1.0]", "model.optim.betas=[0.9, 1.0]: ", "[0, 1)"),
    ("dpo", "model.optim.sched.min_lr=1", "model.optim.sched.min_lr=1.0: ", "model.optim.lr"),
    ("dpo", "model.optim.sched.warmup_steps=9", "model.optim.sched.warmup_steps=9: ", "warmup_ratio=null"),
    ("dpo", "model.optim.sched.warmup_ratio=1.5", "model.optim.sched.warmup_ratio=1.5: ", "[0, 1)"),
    ("dpo", "model.megatron_amp_O2=false", "model.megatron_amp_O2=false: ", "true"),
    ("dpo", "trainer.precision=64", "trainer.gradient_clip_val=1.0: ", "set it to 0"),
    ("dpo", "model.activations_checkpoint_granularity=full", "model.activations_checkpoint_gran", "method=uniform"),
    (
        "dpo",
        "model.activations_checkpoint_method=block",
        "model.activations_checkpoint_method=block: ",
        "granularity=full",
    ),
    (
        "dpo",
        "trainer.devices=3 model.tensor_model_parallel_size=2",
        "trainer.num_nodes=1 x trainer.devices=3: ",
        "change",
    ),
    ("dpo", "trainer.devices=3", "model.global_batch_size=128: ", "3 data-parallel replicas"),
    ("dpo", "model.micro_batch_size=3", "model.global_batch_size=128: ", "model.micro_batch_size=3"),
    (
        "dpo",
        "model.virtual_pipeline_model_parallel_size=2",
        "model.virtual_pipeline_model_parallel_size=2: ",
        "at least 2",
    ),
    ("dpo", "model.virtual_pipeline_model_parallel_size=1", "model.virtual_pipeline_model_parallel_size=1: ", "null"),
    (
        "dpo",
        "trainer.devices=2 model.pipeline_model_parallel_size=2 model.virtual_pipeline_model_parallel_size=2 "
        "model.global_batch_size=3",
        "model.virtual_pipeline_model_parallel_size=2: 3 micro-batches",
        "global_batch_size",
    ),
    ("dpo", "model.sequence_parallel=true", "model.sequence_parallel=true: ", "tensor_model_parallel_size"),
    (
        "dpo",
        "trainer.devices=2 model.context_parallel_size=2 trainer.accelerator=cpu",
        "model.context_parallel_size=2: ",
        "Transformer Engine",
    ),
    (
        "dpo",
        "trainer.devices=2 model.context_parallel_size=2 model.transformer_engine=false",
        "model.context_parallel_size=2: ",
        "transformer_engine=false",
    ),
    (
        "dpo",
        "trainer.devices=2 model.context_parallel_size=2 model.data.batching=packed",
        "model.context_parallel_size=2: ",
        "model.data.batching=bucketed",
    ),
    ("dpo", "model.transformer_engine=true trainer.precision=64", "model.transformer_engine=true: ", "precision=64"),
    ("dpo", "model.encoder_seq_length=1024", "model.encoder_seq_length=1024: ", "max_prompt_length=1024"),
    ("dpo", "model.data.pack_length=9999", "model.data.pack_length=9999: ", "batching=packed"),
    (
        "dpo",
        "model.data.batching=packed model.data.pack_length=4095",
        "model.data.pack_length=4095: ",
        "raise it to 4096",
    ),
    ("dpo", "model.data.batching=packed model.micro_batch_size=2", "model.micro_batch_size=2: ", "pack_length"),
    ("dpo", "model.data.responses=rejected", "model.data.responses=rejected: ", "both responses of a pair"),
    ("dpo", "model.data.data_prefix.train=[]", "model.data.data_prefix.train=[]: ", "no training data"),
    ("dpo", "trainer.val_check_interval=5", "trainer.val_check_interval=5: ", "data_prefix.validation"),
    ("dpo", "trainer.val_before_training=true", "trainer.val_before_training=true: ", "data_prefix.validation"),
    (
        "dpo",
        "exp_manager.create_checkpoint_callback=false exp_manager.checkpoint_callback_params.every_n_train_steps=5",
        "exp_manager.checkpoint_callback_params.every_n_train_steps=5: ",
        "create_checkpoint_callback=false",
    ),
    ("dpo", "exp_manager.checkpoint_callback_params.save_top_k=0", "exp_manager.checkpoint_callback_params.sa", "-1"),
    ("dpo", "exp_manager.wandb_logger_kwargs.project=p", "exp_manager.wandb_logger_kwargs.project=p: ", "create_wandb"),
    ("dpo", "model.dpo.label_smoothing=0.5", "model.dpo.label_smoothing=0.5: ", "[0, 0.5)"),
    ("cdpo", "model.dpo.label_smoothing=0.5", "model.dpo.label_smoothing=0.5: ", "(0, 0.5) for cdpo"),
    ("cdpo", "model.dpo.label_smoothing=0", "model.dpo.label_smoothing=0.0: ", "--config-name dpo"),
    (
        "aligndistil",
        "model.aligndistil.reverse_dpo_path=null",
        "model.aligndistil.reward=contrastive: ",
        "reverse_dpo_path",
    ),
    ("aligndistil", "model.aligndistil.reward=vanilla", "model.aligndistil.reverse_dpo_path=", "remove it"),
    ("aligndistil", "model.aligndistil.initial_path=.", "model.aligndistil.initial_path=.: ", "measure_initial_kl"),
    ("dpo", "model.restore_from_path=/no/such", "model.restore_from_path=/no/such: ", "correct the path"),
    ("dpo", "model.dpo.reference_path=/no/such", "model.dpo.reference_path=/no/such: ", "correct the path"),
    ("aligndistil", "model.aligndistil.dpo_path=/no/such", "model.aligndistil.dpo_path=/no/such: ", "correct the path"),
    ("dpo", "model.data.data_prefix.train=[no.jsonl]", "model.data.data_prefix.train: no.jsonl: ", "correct the path"),
]


@pytest.mark.parametrize(("name", "overrides", "start", "also"), REFUSED)
def test_bad_combinations_get_one_line(paths, name, overrides, start, also):
    config = run(paths, name, *overrides.split())
    with pytest.raises(ConfigError) as caught:
        checks.check(config)
    text = str(caught.value)
    assert text.startswith(start)
    assert also in text
    assert "\n" not in text


MODEL_REFUSED = [
    ("trainer.devices=2 model.tensor_model_parallel_size=2", "9 attention heads; use 1, 3 or 9"),
    ("trainer.devices=9 model.global_batch_size=9 model.tensor_model_parallel_size=9", "3 key-value heads; use 1 or 3"),
    ("trainer.devices=4 model.pipeline_model_parallel_size=4", "30 layers; use 1, 2, 3, 5, 6, 10, 15 or 30"),
    (
        "trainer.devices=2 model.pipeline_model_parallel_size=2 model.virtual_pipeline_model_parallel_size=2",
        "15 layers of a pipeline stage; use 1, 3, 5 or 15",
    ),
    ("model.encoder_seq_length=4096", "lower it to 2048 or less"),
]


@pytest.mark.parametrize(("overrides", "expected"), MODEL_REFUSED)
def test_a_layout_that_does_not_fit_the_model(paths, overrides, expected):
    config = run(paths, "dpo", *overrides.split())
    checks.check(config)
    with pytest.raises(ConfigError) as caught:
        checks.check_model(config, SMOLLM2)
    assert str(caught.value).endswith(expected)


def test_a_layout_that_fits_the_model(paths):
    overrides = "trainer.devices=6 model.tensor_model_parallel_size=3 model.pipeline_model_parallel_size=2"
    checks.check_model(run(paths, "dpo", *overrides.split()), SMOLLM2)


def test_feed_forward_columns_are_divided(paths):
    config = run(paths, "dpo", "trainer.devices=2", "model.tensor_model_parallel_size=2")
    shape = SimpleNamespace(**{**vars(SMOLLM2), "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 9})
    with pytest.raises(ConfigError, match="does not divide the model's 9 feed-forward columns"):
        checks.check_model(config, shape)


RUNTIME_REFUSED = [
    (CPU, "trainer.accelerator=gpu", "trainer.accelerator=gpu: no GPU is visible"),
    (GPUS, "trainer.devices=16", "trainer.devices=16: only 8 GPUs"),
    (CPU, "trainer.devices=2 model.context_parallel_size=2", "model.context_parallel_size=2: needs Transformer Engine"),
    (
        checks.Runtime(gpus=8, installed=frozenset()),
        "trainer.devices=2 model.context_parallel_size=2",
        "model.context_parallel_size=2: needs Transformer Engine; install",
    ),
    (CPU, "model.transformer_engine=true", "model.transformer_engine=true: no GPU is visible"),
    (CPU, "exp_manager.create_wandb_logger=true", "exp_manager.create_wandb_logger=true: wandb is not installed"),
]


@pytest.mark.parametrize(("runtime", "overrides", "start"), RUNTIME_REFUSED)
def test_what_this_machine_cannot_run(paths, runtime, overrides, start):
    with pytest.raises(ConfigError) as caught:
        checks.check_runtime(run(paths, "dpo", *overrides.split()), runtime)
    assert str(caught.value).startswith(start)


def test_what_this_machine_can_run(paths):
    checks.check_runtime(run(paths, "dpo", "trainer.devices=64"), CPU)  # oversubscribed, but possible
    checks.check_runtime(run(paths, "dpo", "trainer.devices=2", "model.context_parallel_size=2"), GPUS)


@pytest.mark.parametrize(
    ("module", "registered"),
    [
        (rules, {*rules.CHOICE_AND_RANGE_RULES, *rules.RULES}),
        (layout_rules, set(layout_rules.LAYOUT_RULES)),
        (peft_rules, set(peft_rules.PEFT_RULES)),
        (rollout_rules, set(rollout_rules.ROLLOUT_RULES)),
        (checks, {*checks.RUNTIME_RULES, *checks.MODEL_RULES}),
    ],
)
def test_every_rule_is_run(module, registered):
    answers = "str | None"
    tree = ast.parse(inspect.getsource(module))
    defined = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and not node.name.startswith("_")
        and node.returns is not None
        and ast.unparse(node.returns) == answers
    }
    assert defined == {rule.__name__ for rule in registered}


def test_every_number_key_exists(paths):
    """A key that a table misspells would never be judged."""
    numbers = (key_ranges.AT_LEAST_ONE, key_ranges.NOT_NEGATIVE, key_ranges.POSITIVE, key_ranges.MINUS_ONE_OR_POSITIVE)
    configs = [run(paths, name) for name in recipe_names()]
    for key in (*itertools.chain(*numbers), *key_ranges.PATHS, *key_ranges.CHOICES):
        *above, last = key.split(".")
        found = []
        for config in configs:
            owner = functools.reduce(lambda node, name: getattr(node, name, None), above, config)
            found.append(hasattr(owner, last))
        assert any(found), key


@given(
    st.integers(1, 4), st.integers(1, 8), st.integers(1, 4), st.integers(1, 4), st.integers(1, 64), st.integers(1, 4)
)
def test_an_accepted_layout_gives_every_replica_whole_micro_batches(nodes, devices, tp, pp, batch, micro):
    config = RunConfig(algorithm="dpo")
    config.trainer.num_nodes, config.trainer.devices = nodes, devices
    config.model.tensor_model_parallel_size, config.model.pipeline_model_parallel_size = tp, pp
    config.model.global_batch_size, config.model.micro_batch_size = batch, micro
    replicas, left_over = divmod(nodes * devices, tp * pp)
    fits = left_over == 0 and replicas > 0 and batch % (replicas * micro) == 0
    broken = any(rule(config) for rule in layout_rules.LAYOUT_RULES)
    assert broken != fits
