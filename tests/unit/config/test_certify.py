"""From overrides to the layout that is certified."""

from __future__ import annotations

import pytest

from megatron_aligndistil.config.certify import CertifyConfig, as_run, check_processes
from megatron_aligndistil.config.compose import load_overrides
from megatron_aligndistil.config.schema import RunConfig
from megatron_aligndistil.errors import ConfigError

TP2, SP = "model.tensor_model_parallel_size=2", "model.sequence_parallel=true"


def run(*overrides: str, world: int | None = None, processes_a_node: int | None = None) -> RunConfig:
    return as_run(load_overrides(CertifyConfig, overrides, "certify"), world, processes_a_node)


@pytest.mark.parametrize(
    ("overrides", "world", "processes_a_node", "nodes", "devices"),
    [
        ((), None, None, 1, 1),
        ((TP2,), None, None, 1, 2),  # one replica
        ((TP2, "trainer.devices=4"), None, None, 1, 4),
        ((TP2,), 4, 4, 1, 4),  # torchrun's number
        ((TP2,), 16, 8, 2, 8),
        ((TP2, "trainer.num_nodes=4"), 16, None, 4, 4),
    ],
)
def test_processes(
    overrides: tuple[str, ...], world: int | None, processes_a_node: int | None, nodes: int, devices: int
) -> None:
    found = run(*overrides, world=world, processes_a_node=processes_a_node)
    assert (found.trainer.num_nodes, found.trainer.devices) == (nodes, devices)


def test_overrides_arrive() -> None:
    found = run(TP2, SP, "model.pipeline_model_parallel_size=2", "model.kernel.chunk_tokens=3", "trainer.precision=64")
    assert found.model.tensor_model_parallel_size == found.model.pipeline_model_parallel_size == 2
    assert found.model.sequence_parallel
    assert found.model.kernel.chunk_tokens == 3
    assert found.trainer.precision == "64"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("model.tensor_paralel_size=2",), "did you mean model.tensor_model_parallel_size?"),
        (("model.optim.lr=1",), "model.optim.lr=1: no such key; there are trainer.accelerator, trainer.num_nodes"),
        (("algorithm=dpo",), "algorithm=dpo: no such key"),
        (("model.tensor_model_parallel_size=two",), "expected an integer"),
        (("hydra.job.name=x",), "Hydra's own settings"),
        ((SP,), "needs model.tensor_model_parallel_size of at least 2"),
        ((TP2, "trainer.devices=3"), "3 processes are not a multiple"),
        (("trainer.precision=16",), "choose one of bf16-mixed, 32, 64"),
        (("model.micro_batch_size=0",), "must be at least 1"),
        (("trainer.devices=0",), "must be at least 1"),
        (("trainer.num_nodes=0",), "must be at least 1"),
        (("model.context_parallel_size=0",), "must be at least 1"),
        (("model.data.batching=packed",), "set it to 1"),
        (("model.virtual_pipeline_model_parallel_size=2",), "needs model.pipeline_model_parallel_size"),
    ],
)
def test_mistakes_are_one_line(overrides: tuple[str, ...], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run(*overrides)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_gpus_are_counted() -> None:
    found = run(TP2)
    check_processes(found, gpus=0)
    check_processes(found, gpus=2)
    with pytest.raises(ConfigError, match="only 1 GPUs"):
        check_processes(found, gpus=1)
