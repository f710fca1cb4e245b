"""On-policy runs: killed in the middle of a rollout they go on to the bit; other layouts draw the same; bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.program import Finished, losses, records, run, run_and_kill, write_model, write_pairs

STEPS = 14
REWARDS = """
def vowels(prompts, responses):
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in responses]

def nothing(prompts, responses):
    return [float("nan")] * len(responses)

def short(prompts, responses):
    return [0.0]

def raising(prompts, responses):
    raise ValueError("no such rubric")
"""


class Setting:
    """Three models, pairs of which the prompts are taken, and reward functions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models = {name: write_model(folder / name, seed) for seed, name in enumerate(("model", "dpo", "reverse"))}
        self.pairs = write_pairs(folder / "pairs.jsonl", 40)
        self.polite = folder / "polite.jsonl"
        rows = [json.loads(line) for line in self.pairs.read_text().splitlines()]
        polite = ({**row, "chosen": f"{row['chosen']} moon", "rejected": f"{row['rejected']} wind"} for row in rows)
        self.polite.write_text("".join(json.dumps(row) + "\n" for row in polite))
        (folder / "my_rewards.py").write_text(REWARDS)

    def arguments(self, recipe: str, log_dir: Path, *overrides: str) -> tuple[str, ...]:
        """8 prompts a rollout, 2 epochs in 4 steps of 4 responses."""
        return (
            *("train", "--config-name", recipe),
            f"model.restore_from_path={self.models['model']}",
            f"model.data.data_prefix.train=[{self.pairs}]",
            f"model.data.data_prefix.validation=[{self.pairs}]",
            f"model.data.cache_dir={self.folder / 'cache'}",
            f"exp_manager.explicit_log_dir={log_dir}",
            "exp_manager.resume_if_exists=true",
            "exp_manager.checkpoint_callback_params.every_n_train_steps=3",
            "model.encoder_seq_length=128",
            "model.data.max_prompt_length=96",
            "model.rollout.max_new_tokens=12",
            "model.rollout.prompts_per_rollout=8",
            "model.rollout.epochs_per_rollout=2",
            "model.global_batch_size=4",
            "model.micro_batch_size=2",
            "model.optim.lr=1e-2",
            "trainer.limit_val_batches=1",
            f"trainer.max_steps={STEPS}",
            "trainer.max_epochs=100",
            "trainer.precision=32",
            *self.own(recipe),
            *overrides,
        )

    def own(self, recipe: str) -> tuple[str, ...]:
        dpo, reverse = self.models["dpo"], self.models["reverse"]
        if recipe == "aligndistil_on_policy":
            return f"model.aligndistil.dpo_path={dpo}", f"model.aligndistil.reverse_dpo_path={reverse}"
        if recipe in ("token_pg", "sentence_pg"):
            return f"model.pg.dpo_path={dpo}", f"model.pg.reverse_dpo_path={reverse}"
        more = (f"model.rto.dpo_path={dpo}",) if recipe == "rto" else ()
        return "model.reward.source=function", "model.reward.function=my_rewards:vowels", *more


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("on-policy"))


@pytest.fixture(autouse=True)
def in_the_folder_of_the_rewards(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(setting.folder)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))


TWO_STAGES = ("trainer.devices=2", "model.pipeline_model_parallel_size=2")
TWO_REPLICAS = ("trainer.devices=2", "model.optim.name=distributed_fused_adam")
# The engines' weights age over two rollouts here, the KL coefficient adapts, a critic is trained: all must come back.
RUNS = {
    "aligndistil_on_policy": (*TWO_STAGES, "model.rollout.samples_per_prompt=2", "model.rollout.prompts_per_rollout=4"),
    "ppo": (
        *TWO_REPLICAS,
        "model.ppo.kl_target=0.01",
        "model.ppo.kl_horizon=20",
        "model.rollout.sync_every=8",
        "model.ppo.critic.optim.lr=1e-2",
    ),
}


@pytest.mark.parametrize("recipe", [pytest.param("aligndistil_on_policy", marks=pytest.mark.slow), "ppo"])
def test_a_run_killed_between_the_steps_of_a_rollout_resumes_to_the_bit(setting: Setting, recipe: str) -> None:
    whole, killed = setting.folder / f"whole-{recipe}", setting.folder / f"killed-{recipe}"
    finished = run(*setting.arguments(recipe, whole, *RUNS[recipe]))
    assert finished.exit_code == 0, finished.errors
    expected = losses(whole)
    assert sorted(expected) == list(range(1, STEPS + 1))

    # Checkpoints after 3, 6, 9, …: all but every fourth in the middle of a rollout of 4 steps.
    run_and_kill(killed, 7, 0.0, *setting.arguments(recipe, killed, *RUNS[recipe]))
    assert run(*setting.arguments(recipe, killed, *RUNS[recipe])).exit_code == 0
    assert losses(killed) == expected
    for before, after in zip(records(whole), records(killed), strict=True):
        same = [key for key in before if not key.endswith(("seconds", "per_second", "gib", "mib", "restarts"))]
        assert {key: after.get(key) for key in same} == {key: before[key] for key in same}
    assert records(killed, "validation")[-1]["loss"] == records(whole, "validation")[-1]["loss"]


def _first(log_dir: Path) -> dict[str, float]:
    return records(log_dir)[0]


def test_every_layout_draws_the_same_responses(setting: Setting) -> None:
    layouts = {
        "one": (),
        "tp2": ("trainer.devices=2", "model.tensor_model_parallel_size=2", "model.sequence_parallel=true"),
        "dp2-packed": ("trainer.devices=2", "model.data.batching=packed", "model.micro_batch_size=1"),
    }
    found = {}
    for name, layout in layouts.items():
        log_dir = setting.folder / f"layout-{name}"
        finished = run(*setting.arguments("ppo", log_dir, *layout, "trainer.max_steps=3"))
        assert finished.exit_code == 0, finished.errors
        found[name] = records(log_dir)
    for name, steps in found.items():
        for key in ("rollout/response_tokens", "reward", "rollout/responses"):
            assert steps[0][key] == pytest.approx(found["one"][0][key], rel=1e-6), (name, key)
        for own, one in zip(steps, found["one"], strict=True):
            for key in ("loss", "critic_loss"):
                assert own[key] == pytest.approx(one[key], rel=2e-4, abs=2e-6), (name, key)


@pytest.mark.parametrize("recipe", ["rto", "sentence_pg", "token_pg"])
def test_every_algorithm_runs(setting: Setting, recipe: str) -> None:
    log_dir = setting.folder / recipe
    finished = run(*setting.arguments(recipe, log_dir, "trainer.max_steps=5"))
    assert finished.exit_code == 0, finished.errors
    steps = records(log_dir)
    assert [step["rollout/off_policy_steps"] for step in steps] == [0, 1, 2, 3, 0]
    assert all(step["rollout/logprob_gap"] < 1e-5 for step in steps if "rollout/logprob_gap" in step)


def test_a_reward_model_is_trained_exported_and_used(setting: Setting) -> None:
    from transformers import AutoModelForSequenceClassification

    log_dir = setting.folder / "reward_model"
    finished = run(
        *("train", "--config-name", "reward_model"),
        f"model.restore_from_path={setting.models['model']}",
        f"model.data.data_prefix.train=[{setting.polite}]",
        f"model.data.data_prefix.validation=[{setting.polite}]",
        f"model.data.cache_dir={setting.folder / 'cache'}",
        f"exp_manager.explicit_log_dir={log_dir}",
        "exp_manager.checkpoint_callback_params.export_hf_on_train_end=true",
        "model.encoder_seq_length=128",
        "model.data.max_prompt_length=96",
        "model.global_batch_size=8",
        "trainer.max_steps=30",
        "trainer.max_epochs=100",
        "trainer.precision=32",
        "model.optim.lr=1e-2",
        "trainer.devices=2",
        "model.tensor_model_parallel_size=2",
    )
    assert finished.exit_code == 0, finished.errors
    accuracy = records(log_dir, "validation")[-1]["reward_accuracy"]
    assert accuracy > 0.9, "chosen responses end in another word than rejected ones"
    exported = AutoModelForSequenceClassification.from_pretrained(log_dir / "huggingface")
    assert exported.score.weight.shape == (1, 32)
    own = ("model.reward.source=model", "model.reward.function=null", "trainer.max_steps=1")
    for path in (log_dir, log_dir / "huggingface"):
        used = setting.folder / f"used-{path.name}"
        finished = run(*setting.arguments("ppo", used, *own, f"model.reward.path={path}"))
        assert finished.exit_code == 0, finished.errors
    first, second = (_first(setting.folder / f"used-{name}") for name in ("reward_model", "huggingface"))
    assert first["reward"] == second["reward"] != 0.0
    refused = run(*setting.arguments("ppo", setting.folder / "refused", f"model.ppo.reference_path={log_dir}"))
    assert_one_line(refused, f"model.ppo.reference_path={log_dir}: a reward model, and a language model is needed")


def assert_one_line(finished: Finished, *parts: str) -> None:
    assert finished.exit_code == 2, finished.errors
    assert "Traceback" not in finished.errors
    (line,) = finished.error_lines
    for part in parts:
        assert part in line


BAD = [
    ("model.reward.function=my_rewards:nothing", "my_rewards:nothing: gives nan for", "return a finite number"),
    (
        "model.reward.function=my_rewards:short",
        "my_rewards:short: gives 1 values for 8 responses",
    ),
    ("model.reward.function=my_rewards:raising", "raises ValueError: no such rubric (my_rewards.py:12)"),
    ("model.reward.function=my_rewards:absent", "my_rewards has no function absent"),
    ("model.reward.function=nowhere:absent", "importing nowhere fails: ModuleNotFoundError"),
    ("model.reward.function=vowels", "not of the form module:function"),
    ("model.rollout.max_logprob_gap=1e-12", "model.rollout.max_logprob_gap=1e-12: after new weights", "nats a token"),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: case[0].partition("=")[2])
def test_what_goes_wrong_is_one_line(setting: Setting, case: tuple[str, ...]) -> None:
    override, *parts = case
    log_dir = setting.folder / f"bad-{abs(hash(override))}"
    assert_one_line(run(*setting.arguments("ppo", log_dir, override)), *parts)


def test_a_resumed_run_must_draw_as_before(setting: Setting) -> None:
    log_dir = setting.folder / "changed"
    assert run(*setting.arguments("token_pg", log_dir, "trainer.max_steps=3")).exit_code == 0
    finished = run(*setting.arguments("token_pg", log_dir, "model.rollout.temperature=0.5"))
    assert_one_line(finished, "rollout was", "temperature 1", "is", "temperature 0.5")
