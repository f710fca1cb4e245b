"""The keys of ``aligndistil certify``: those of a run that decide its layout, its number types and its kernels."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_aligndistil.config.base_schema import DataConfig, KernelConfig, ModelConfig, TrainerConfig
from megatron_aligndistil.config.checks import Runtime, processes_have_a_gpu_each
from megatron_aligndistil.config.layout_rules import LAYOUT_RULES, context_parallel_is_not_asked_of_a_cpu
from megatron_aligndistil.config.optional import OptionalInt, OptionalStr
from megatron_aligndistil.config.rules import CHOICE_AND_RANGE_RULES, packed_row_holds_the_longest_example
from megatron_aligndistil.config.schema import RunConfig
from megatron_aligndistil.errors import ConfigError


@dataclass(kw_only=True)
class CertifyTrainerConfig:
    """``trainer``."""

    accelerator: str = "auto"
    num_nodes: OptionalInt = None  # default: as many as the launcher uses
    devices: OptionalInt = None  # processes a node; default: as many as the launcher started, or one replica
    precision: OptionalStr = None  # 64 | 32 | bf16-mixed (kernels alone); default: all of them
    timeout_minutes: float = 30.0


@dataclass(kw_only=True)
class CertifyDataConfig:
    """``model.data``."""

    batching: str = "bucketed"


@dataclass(kw_only=True)
class CertifyModelConfig:
    """``model``; a kernel's plan "auto" and chunk null stand for several of each."""

    micro_batch_size: int = 4  # examples; with packed rows 1
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: OptionalInt = None
    context_parallel_size: int = 1
    sequence_parallel: bool = False
    data: CertifyDataConfig = field(default_factory=CertifyDataConfig)
    kernel: KernelConfig = field(default_factory=KernelConfig)


@dataclass(kw_only=True)
class CertifyConfig:
    """All of it; the keys are a run's."""

    trainer: CertifyTrainerConfig = field(default_factory=CertifyTrainerConfig)
    model: CertifyModelConfig = field(default_factory=CertifyModelConfig)

    @property
    def replica_size(self) -> int:
        """Processes that hold one copy of the model."""
        model = self.model
        return model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.context_parallel_size


def as_run(config: CertifyConfig, world: int | None, processes_a_node: int | None) -> RunConfig:
    """The run of that layout, checked.

    world             processes that a launcher has started, None where none has
    processes_a_node  of them, where the launcher says so

    Raises:
        ConfigError: a value or a combination that no run takes.
    """
    trainer, model = config.trainer, config.model
    nodes, devices = trainer.num_nodes, trainer.devices
    if nodes is None:
        nodes = world // processes_a_node if world and processes_a_node else 1
    if devices is None:
        devices = world // max(1, nodes) if world else config.replica_size
    shared = {name: value for name, value in vars(model).items() if name != "data"}
    run = RunConfig(
        trainer=TrainerConfig(
            accelerator=trainer.accelerator,
            num_nodes=nodes,
            devices=devices,
            precision="32" if trainer.precision is None else trainer.precision,
            timeout_minutes=trainer.timeout_minutes,
        ),
        model=ModelConfig(**shared, data=DataConfig(batching=model.data.batching)),
    )
    for rule in CHOICE_AND_RANGE_RULES:
        _raise(rule(run))
    # Whole rounds of micro-batches for every replica, whatever their number: the certificate fills them up.
    replicas = max(1, nodes * devices // config.replica_size)
    run.model.global_batch_size = replicas * model.micro_batch_size * model.pipeline_model_parallel_size
    for rule in (*LAYOUT_RULES, packed_row_holds_the_longest_example):
        # The certificate runs attention that needs no Transformer Engine everywhere.
        if rule is not context_parallel_is_not_asked_of_a_cpu:
            _raise(rule(run))
    return run


def check_processes(run: RunConfig, gpus: int) -> None:
    """Raise ConfigError where this machine cannot give every process what ``trainer.accelerator`` asks for."""
    _raise(processes_have_a_gpu_each(run, Runtime(gpus=gpus, installed=frozenset())))


def _raise(complaint: str | None) -> None:
    if complaint is not None:
        raise ConfigError(complaint)
