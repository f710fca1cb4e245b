"""From a value of NeMo-Aligner's to ours, where the two differ in unit, spelling or meaning.

A conversion takes the value and the file that it stands in, and answers the value of our key, or ``Keys`` where it
decides several. It raises ``Refused`` with a reason where there is no equal here, and ``Agreed`` where none is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_aligndistil.config.nemo_file import ON_POLICY, NemoFile


@dataclass(frozen=True)
class Keys:
    """Several of our keys at once."""

    values: dict[str, Any]


class Refused(Exception):
    """There is no equal here; the text says why, and what to do instead."""


class Agreed(Exception):
    """Nothing has to be set for it; the text says why."""


Conversion = Callable[[Any, NemoFile], Any]

_CHECKPOINTS = "exp_manager.checkpoint_callback_params"


def unchanged(value: Any, file: NemoFile) -> Any:
    if value is None:
        raise Agreed("null")
    return value


def precision(value: Any, file: NemoFile) -> Any:
    if str(value) in ("bf16", "bf16-mixed"):
        return "bf16-mixed"
    if str(value) in ("32", "32-true"):
        return "32"
    raise Refused("there are bf16-mixed and 32")


def accelerator(value: Any, file: NemoFile) -> Any:
    return "gpu" if value == "cuda" else value


def devices(value: Any, file: NemoFile) -> Any:
    if isinstance(value, int) and value > 0:
        return value
    raise Refused("give the number of processes a node: trainer.devices=<number>")


def clipping(value: Any, file: NemoFile) -> Any:
    return 0.0 if value is None or value <= 0 else value


def _optimizer_steps(value: int, file: NemoFile) -> int:
    """Steps of the file's trainer as optimizer steps: on-policy ones count rollouts, each of which is several."""
    if file.section not in ON_POLICY or value <= 0:
        return value
    responses, batch = file.get("model.ppo.num_rollout_samples"), file.get("model.global_batch_size")
    if not responses or not batch or responses % batch:
        raise Refused(
            "counts rollouts, which are model.ppo.num_rollout_samples / model.global_batch_size optimizer steps each; "
            "give both, or the number of optimizer steps here"
        )
    return int(value * (responses // batch))


def steps(value: Any, file: NemoFile) -> Any:
    if value is None:
        raise Agreed("null")
    return _optimizer_steps(value, file)


def validation_interval(value: Any, file: NemoFile) -> Any:
    if isinstance(value, float):
        raise Refused("a share of an epoch; give the optimizer steps between validations")
    if value is None or value <= 0:
        return Keys({"trainer.val_check_interval": 0, "trainer.val_after_training": False})
    return _optimizer_steps(value, file)


def validation_batches(value: Any, file: NemoFile) -> Any:
    if value is None or (isinstance(value, float) and value >= 1.0):
        return -1
    if isinstance(value, float):
        raise Refused("a share of the validation set; give the global batches of a validation")
    if value == 0:
        return Keys({"trainer.val_check_interval": 0, "trainer.val_after_training": False})
    return value


def save_interval(value: Any, file: NemoFile) -> Any:
    if isinstance(value, float):
        raise Refused("not a whole number of steps")
    if value is None or value <= 0:
        return Keys({f"{_CHECKPOINTS}.every_n_train_steps": 0, f"{_CHECKPOINTS}.save_on_train_end": False})
    return _optimizer_steps(value, file)


def save_at_end(value: Any, file: NemoFile) -> Any:
    if value:
        return True
    raise Agreed("only leaves out the .nemo file: NeMo-Aligner writes a checkpoint at the end in any case")


def optimizer(value: Any, file: NemoFile) -> Any:
    if value in ("distributed_fused_adam", "mcore_distributed_optim"):
        return "distributed_fused_adam"
    if value in ("fused_adam", "megatron_fused_adam", "adamw"):
        return "adam"
    if value == "adam" and not file.get("model.optim.weight_decay"):
        return "adam"
    if value == "adam":
        raise Refused("its weight decay is part of the gradient (L2), here it is decoupled (AdamW)")
    raise Refused("there are adam and distributed_fused_adam")


def schedule(value: Any, file: NemoFile) -> Any:
    if value in ("CosineAnnealing", "WarmupAnnealing", "WarmupPolicy"):
        return value
    raise Refused("there are CosineAnnealing, WarmupAnnealing and WarmupPolicy")


def model_path(value: Any, file: NemoFile) -> Any:
    if value is None:
        raise Agreed("null")
    if str(value).endswith(".nemo"):
        raise Refused(".nemo files are not read; give the model as a Hugging Face folder")
    return value


def peft_scheme(value: Any, file: NemoFile) -> Any:
    if value in (None, "none"):
        return None
    if value == "lora":
        return value
    raise Refused("there is lora")


def of_adapter(value: Any, file: NemoFile) -> Any:
    if file.get("model.peft.peft_scheme", "none") == "none":
        raise Agreed("no adapter is trained")
    return unchanged(value, file)


def adapter_path(value: Any, file: NemoFile) -> Any:
    return model_path(of_adapter(value, file), file)


def wandb(value: Any, file: NemoFile) -> Any:
    if not file.get("exp_manager.create_wandb_logger", False):
        raise Agreed("no logger is created")
    return unchanged(value, file)


def data_files(value: Any, file: NemoFile) -> Any:
    if value is None:
        raise Agreed("null")
    files = [value] if isinstance(value, str) else value
    if all(isinstance(name, str) for name in files):
        return files
    raise Refused("a blend by weights; name the files, each is taken whole")


def undivided_data(value: Any, file: NemoFile) -> Any:
    if not value:
        raise Agreed("empty")
    raise Refused(
        "one list that splits_string divides; name the files of each: model.data.data_prefix.{train,validation}"
    )


def temperature(value: Any, file: NemoFile) -> Any:
    return 0.0 if file.get("model.ppo.sampling_params.use_greedy", False) else value


def kl_penalty(value: Any, file: NemoFile) -> Any:
    section = {"reverse_dpo": "dpo", "cdpo": "dpo", "tdpo1": "tdpo", "tdpo2": "tdpo"}.get(
        file.algorithm, file.algorithm
    )
    if section not in ("dpo", "ipo", "kto", "tdpo"):
        raise Refused(f"{file.algorithm} has no such coefficient")
    return Keys({f"model.{section}.beta": value})


def mean_log_probs(value: Any, file: NemoFile) -> Any:
    if file.algorithm == "ipo":
        return Keys({"model.ipo.normalize_by_length": bool(value)})
    if not value:
        raise Agreed("log-probs are summed here too")
    raise Refused(f"{file.algorithm} sums log-probs over the response")


def warmup(value: Any, file: NemoFile) -> Any:
    return Keys({"model.optim.sched.warmup_steps": unchanged(value, file), "model.optim.sched.warmup_ratio": None})


def part_of_folder(value: Any, file: NemoFile) -> Any:
    if value is not None and file.get("exp_manager.explicit_log_dir"):
        raise Refused("NeMo ignores it beside explicit_log_dir")
    return unchanged(value, file)


def inherited(value: Any, file: NemoFile) -> Any:
    if inherits(value):
        raise Refused("files that it inherits from are not read; translate what --cfg job prints")
    raise Agreed("optional")


def inherits(defaults: Any) -> bool:
    """Whether a Hydra ``defaults`` list names files that must be there."""
    names = [next(iter(entry)) if isinstance(entry, dict) else str(entry) for entry in defaults or []]
    return any(not name.startswith("optional ") and name != "_self_" for name in names)
