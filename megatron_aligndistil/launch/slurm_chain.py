"""The whole recipe as Slurm jobs: DPO beside reverse DPO, then AlignDistil, its export, its evaluation."""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

from megatron_aligndistil.config import analysis_rules, compose
from megatron_aligndistil.config.analysis_schema import RewardAccuracyAnalysisConfig
from megatron_aligndistil.config.schema import AlignDistilRunConfig, DPORunConfig, RunConfig
from megatron_aligndistil.config.slurm_schema import SlurmConfig
from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.launch.slurm_plan import LOG_DIR, Plan, Recipe, key_of, override, plan
from megatron_aligndistil.launch.slurm_script import Job, Task
from megatron_aligndistil.launch.variants import FINISHED

DPO, REVERSE, ALIGNED, EXPORT, EVALUATE = "dpo", "reverse_dpo", "aligndistil", "export", "evaluate"
STAGES = (DPO, REVERSE, ALIGNED, EXPORT, EVALUATE)
TEACHERS = "teachers"  # the job of the first two
_OF_STAGE = re.compile(rf"({'|'.join(STAGES)}):(.+)", re.DOTALL)
_SCHEMAS: Mapping[str, type[RunConfig]] = {
    DPO: DPORunConfig,
    REVERSE: DPORunConfig,
    ALIGNED: AlignDistilRunConfig,
}
_NAME = "exp_manager.name"
_TEACHER_PATHS = ("model.aligndistil.dpo_path", "model.aligndistil.reverse_dpo_path")
_ANALYSIS = "reward_accuracy"
# The first two are one array, export and evaluation follow AlignDistil's run.
_ONLY_SHARED = {DPO: ("slurm.",), REVERSE: ("slurm.",)} | {
    stage: ("slurm.nodes=", "slurm.gpus_per_node=") for stage in (EXPORT, EVALUATE)
}


@dataclass(frozen=True)
class Request:
    """What the user asks for; ``settings_of`` makes slurm settings of their overrides."""

    config_name: str | None
    config_dir: str | None
    overrides: tuple[str, ...]
    settings_of: Callable[[Sequence[str]], SlurmConfig]
    made_by: str


@dataclass(frozen=True)
class Chain:
    """The jobs, each after the one before it, and the names of stages that had ended before."""

    jobs: tuple[Job, ...]
    finished: tuple[str, ...]


def stage_of(text: str) -> tuple[str | None, str]:
    """The stage that an override is for, None for all, and the override."""
    match = _OF_STAGE.fullmatch(text)
    return (match[1], match[2]) if match else (None, text)


def chain(request: Request) -> Chain:
    """Plan and check every stage; nothing is written. Stages that have ended by the same settings are left out.

    Raises:
        ConfigError: a stage that cannot run.
    """
    return _Planner(request).chain()


class _Planner:
    def __init__(self, request: Request) -> None:
        self.request = request
        given: dict[str | None, list[str]] = {None: [], **{stage: [] for stage in STAGES}}
        for text in request.overrides:
            stage, own = stage_of(text)
            given[stage].append(own)
        self.given = given
        self.root = self._root()
        self.settings = {job: self._settings(job) for job in (TEACHERS, ALIGNED, EXPORT, EVALUATE)}

    def chain(self) -> Chain:
        dpo, reverse, aligned = self._plan(DPO, ()), self._plan(REVERSE, ()), self._plan(ALIGNED, self._made())
        self._refuse_two_places(dpo, reverse)
        alone = dataclasses.replace(aligned, nodes=1, devices=1, on_gpus=False)
        evaluation = self._evaluation(aligned)
        jobs: list[tuple[str, list[Task], Plan]] = [
            (TEACHERS, [_training(name, run) for name, run in ((DPO, dpo), (REVERSE, reverse)) if _waits(run)], dpo),
            (ALIGNED, [_training(ALIGNED, aligned)] if _waits(aligned) else [], aligned),
        ]
        trains = any(tasks for _, tasks, _ in jobs)
        export = self._export()
        if trains and export.results.exists():
            raise ConfigError(f"{export.results}: exported by an earlier chain, other settings train now; remove it")
        jobs.append((EXPORT, [] if export.results.exists() else [export], alone))
        if evaluation is not None:
            ended = not trains and (evaluation.results / f"{_ANALYSIS}.md").exists()
            jobs.append((EVALUATE, [] if ended else [evaluation], aligned))
        stages: list[Job] = []
        for name, tasks, where in jobs:
            if tasks:
                stages.append(self._job(name, tuple(tasks), where, is_first=not stages))
        waiting = {task.name for job in stages for task in job.tasks}
        known = [*STAGES[:-1], *([] if evaluation is None else [EVALUATE])]
        return Chain(tuple(stages), tuple(name for name in known if name not in waiting))

    def _root(self) -> Path:
        """``exp_manager.explicit_log_dir`` of the chain: every stage has a folder in it."""
        shared = {key_of(text): text.partition("=")[2] for text in self.given[None]}
        for stage in STAGES:
            for text in self.given[stage]:
                if key_of(text) in (LOG_DIR, _NAME, *_TEACHER_PATHS):
                    raise ConfigError(f"{stage}:{text}: follows from the chain's folder; remove it")
                if text.startswith(_ONLY_SHARED.get(stage, ())):
                    raise ConfigError(f"{stage}:{text}: cannot differ from other stages; give it without '{stage}:'")
        for key in _TEACHER_PATHS:
            if key in shared:
                raise ConfigError(f"{key}={shared[key]}: --chain trains that model itself; remove the key")
        folder = shared.get(LOG_DIR, str(Path("runs") / shared.get(_NAME, "chain"))).strip("'\"")
        return Path(os.path.abspath(Path(folder).expanduser()))

    def _made(self) -> tuple[tuple[str, Path], ...]:
        return tuple(zip(_TEACHER_PATHS, (self.root / DPO, self.root / REVERSE), strict=True))

    def _settings(self, job: str) -> SlurmConfig:
        given = [*self.given[None], *self.given.get(job, [])]
        return self.request.settings_of([text for text in given if key_of(text).startswith("slurm.")])

    def _plan(self, stage: str, made: tuple[tuple[str, Path], ...]) -> Plan:
        schema, name = _SCHEMAS[stage], self._config_name(stage)
        settings = self.settings[ALIGNED if stage == ALIGNED else TEACHERS]
        shared = [text for text in self.given[None] if self._concerns(text, schema)]
        own = [text for text in (*shared, *self.given[stage]) if not key_of(text).startswith("slurm.")]
        own = [text for text in own if key_of(text) not in (LOG_DIR, _NAME)]
        named = [override(LOG_DIR, self.root / stage), override(_NAME, f"{self.root.name}-{stage}")]
        made_plan = plan(Recipe(name, self.request.config_dir, (*own, *named), made), settings)
        if not isinstance(made_plan.config, schema):
            raise ConfigError(f"--config-name {name}: trains by {made_plan.config.algorithm}, not by {stage}")
        return made_plan

    def _config_name(self, stage: str) -> str:
        """``uf_dpo`` beside ``uf_aligndistil``."""
        name = (self.request.config_name or ALIGNED).removesuffix(".yaml")
        before, found, _ = name.partition(ALIGNED)
        if not found:
            raise ConfigError(
                f"--config-name {name}: with --chain the name of the AlignDistil recipe, such as uf_aligndistil beside "
                "uf_dpo and uf_reverse_dpo"
            )
        return name if stage == ALIGNED else before + stage

    def _concerns(self, text: str, schema: type[RunConfig]) -> bool:
        """Whether a shared override goes to a run of ``schema``: it has the key, or no stage has, which is refused."""
        key = key_of(text)
        return _has_key(schema, key) or not any(_has_key(other, key) for other in _SCHEMAS.values())

    def _job(self, name: str, tasks: tuple[Task, ...], where: Plan, is_first: bool) -> Job:
        settings = self.settings[name]
        folder = Path(os.path.abspath(settings.log_dir)) if settings.log_dir else self.root / "slurm"
        own = dataclasses.replace(
            settings,
            job_name=f"{settings.job_name or self.root.name}-{name}",
            # The others wait for their predecessors.
            dependency=settings.dependency if is_first else None,
        )
        return Job(name, tasks, where.nodes, where.devices, where.on_gpus, own, folder, self.request.made_by)

    def _refuse_two_places(self, dpo: Plan, reverse: Plan) -> None:
        if (dpo.nodes, dpo.devices, dpo.on_gpus) != (reverse.nodes, reverse.devices, reverse.on_gpus):
            raise ConfigError(
                f"{DPO} runs on {dpo.nodes} x {dpo.devices} devices, {REVERSE} on {reverse.nodes} x {reverse.devices}: "
                "they are one job array; give slurm.nodes and slurm.gpus_per_node"
            )

    def _export(self) -> Task:
        for text in self.given[EXPORT]:
            if not key_of(text).startswith("slurm."):
                raise ConfigError(f"{EXPORT}:{text}: the export takes slurm.* only; remove it")
        output = self.root / "huggingface"
        return Task(EXPORT, ("convert", str(self.root / ALIGNED), str(output), "--to", "hf"), output)

    def _evaluation(self, aligned: Plan) -> Task | None:
        """How well the two rewards tell held-out pairs apart (the paper's Table 2); nothing without such pairs."""
        pairs = aligned.config.model.data.data_prefix.validation
        if not pairs:
            return None
        initial, output = aligned.config.model.restore_from_path, self.root / "evaluation"
        own = [text for text in self.given[EVALUATE] if not key_of(text).startswith("slurm.")]
        models = {f"models.{DPO}": self.root / DPO, f"models.{REVERSE}": self.root / REVERSE}
        shared = [
            override("output", output),
            *(override(key, path) for key, path in models.items()),
            override("models.reference", initial),
            override("analysis.test", list(pairs)),
            *_layout(aligned.config),
        ]
        here = [override(key, initial) for key, path in models.items() if not path.exists()]
        config = compose.load_overrides(RewardAccuracyAnalysisConfig, [*shared, *here, *own], _ANALYSIS)
        analysis_rules.check(config)
        analysis_rules.as_run(config, initial)
        return Task(EVALUATE, ("analyze", _ANALYSIS, *shared, *own), output)


def _layout(run: RunConfig) -> list[str]:
    """The run's keys that an analysis has too, where they aren't the analysis's defaults."""

    def differing(default: object, own: object, prefix: str) -> Iterator[str]:
        assert is_dataclass(default)
        for field in fields(default):
            theirs, ours = getattr(default, field.name), getattr(own, field.name)
            if is_dataclass(theirs):
                yield from differing(theirs, ours, f"{prefix}.{field.name}")
            elif theirs != ours:
                yield override(f"{prefix}.{field.name}", ours)

    defaults = RewardAccuracyAnalysisConfig()
    return [*differing(defaults.trainer, run.trainer, "trainer"), *differing(defaults.model, run.model, "model")]


def _has_key(schema: type[object], key: str) -> bool:
    """Whether a schema has the dotted key; below a free-form mapping it has every one."""
    node: object = schema
    for name in key.split("."):
        if not (isinstance(node, type) and is_dataclass(node)):
            return True
        types = typing.get_type_hints(node)
        if name not in types:
            return False
        node = types[name]
    return True


def _training(name: str, made: Plan) -> Task:
    marker = made.log_dir / "config.yaml", made.log_dir / FINISHED
    return Task(name, made.arguments, made.log_dir, marker)


def _waits(made: Plan) -> bool:
    """Whether the stage hasn't ended yet by these settings."""
    marker = made.log_dir / FINISHED
    return not (marker.is_file() and marker.read_text(encoding="utf-8") == compose.to_yaml(made.config))
