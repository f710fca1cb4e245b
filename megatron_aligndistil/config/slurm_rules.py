"""The keys ``slurm.*`` judged before anything is written or submitted."""

from __future__ import annotations

import re

from megatron_aligndistil.config.slurm_schema import SlurmConfig
from megatron_aligndistil.errors import ConfigError

RUNTIMES = ("pyxis", "apptainer")
LONGEST_SIGNAL_SECONDS = 65535  # Slurm's own bound
_AT_LEAST = {"nodes": 1, "gpus_per_node": 0, "cpus_per_task": 1, "signal_seconds": 1}
_ONE_LINE = ("partition", "account", "qos", "job_name", "mem", "dependency", "log_dir", "python", "container_image")
_TIME = re.compile(r"(?:(\d+)-(\d{1,2})(?::(\d{2}))?(?::(\d{2}))?|(\d+):(\d{2}):(\d{2}))")
_URI = re.compile(r"[a-z][a-z-]*://")


def check(config: SlurmConfig) -> None:
    """Raise ConfigError for the first value that cannot be used."""
    for rule in _RULES:
        complaint = rule(config)
        if complaint is not None:
            raise ConfigError(complaint)


def seconds_of(time: str) -> int | None:
    """A time limit in seconds; None where it isn't written as D-HH[:MM[:SS]] or HH:MM:SS."""
    match = _TIME.fullmatch(time)
    if match is None:
        return None
    days, *of_day = match.groups()[:4] if match[1] is not None else (0, *match.groups()[4:])
    hours, minutes, seconds = (int(part or 0) for part in of_day)
    return ((int(days) * 24 + hours) * 60 + minutes) * 60 + seconds


def runtime_of(config: SlurmConfig) -> str | None:
    """What starts the container; None without one. Images that only apptainer reads tell it from pyxis."""
    image = config.container_image
    if image is None or config.container_runtime is not None:
        return config.container_runtime
    return "apptainer" if image.endswith(".sif") or _URI.match(image) else "pyxis"


def numbers_are_in_their_ranges(config: SlurmConfig) -> str | None:
    for name, least in _AT_LEAST.items():
        value = getattr(config, name)
        if value is not None and value < least:
            return f"slurm.{name}={value}: out of range; must be at least {least}"
    if config.signal_seconds > LONGEST_SIGNAL_SECONDS:
        return f"slurm.signal_seconds={config.signal_seconds}: out of range; must be at most {LONGEST_SIGNAL_SECONDS}"
    return None


def texts_are_one_line(config: SlurmConfig) -> str | None:
    for name in _ONE_LINE:
        value = getattr(config, name)
        if value is not None and (not value.strip() or re.search(r"[\n\r\"]", value)):
            return f"slurm.{name}={value!r}: must be one line without double quotes; correct it or remove the key"
    return None


def time_is_a_limit_that_leaves_room_for_the_signal(config: SlurmConfig) -> str | None:
    if config.time is None:
        return None
    seconds = seconds_of(config.time)
    if seconds is None or seconds == 0:
        return f"slurm.time={config.time}: not a time limit; write HH:MM:SS or D-HH:MM:SS, in a YAML file in quotes"
    if seconds <= config.signal_seconds:
        return (
            f"slurm.signal_seconds={config.signal_seconds}: the run would be stopped as soon as it starts, since "
            f"slurm.time={config.time}; raise the time or lower slurm.signal_seconds"
        )
    return None


def container_has_its_runtime(config: SlurmConfig) -> str | None:
    runtime = config.container_runtime
    if runtime is not None and runtime not in RUNTIMES:
        return f"slurm.container_runtime={runtime}: not a value of this key; choose one of {', '.join(RUNTIMES)}"
    if config.container_image is not None:
        return None
    for name in ("container_runtime", "container_mounts"):
        if getattr(config, name):
            return f"slurm.{name}={getattr(config, name)}: has no effect without slurm.container_image; add it"
    return None


def mounts_name_two_folders(config: SlurmConfig) -> str | None:
    for mount in config.container_mounts:
        parts = mount.split(":")
        if len(parts) not in (2, 3) or not all(parts) or "," in mount:
            return f"slurm.container_mounts: {mount}: write <folder on the node>:<folder in the container>[:<options>]"
    return None


def environment_has_names_of_variables(config: SlurmConfig) -> str | None:
    for name, value in config.environment.items():
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            return f"slurm.environment.{name}={value}: not a name of a variable; use letters, digits and _"
    return None


def extra_options_are_options(config: SlurmConfig) -> str | None:
    for option in config.extra:
        if not option.startswith("-") or "\n" in option:
            return f"slurm.extra: {option!r}: not an option of sbatch; write one an item, such as --constraint=h100"
    return None


_RULES = (
    numbers_are_in_their_ranges,
    texts_are_one_line,
    time_is_a_limit_that_leaves_room_for_the_signal,
    container_has_its_runtime,
    mounts_name_two_folders,
    environment_has_names_of_variables,
    extra_options_are_options,
)
