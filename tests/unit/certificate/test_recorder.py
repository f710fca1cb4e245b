"""The recorder's bytes against programs whose peak is known, its words against known collectives."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_aligndistil.certificate.recorder import Recorder, recorded
from tests.distributed.harness import run_ranks

KILOBYTE = 1000  # 250 float32

counts_storages = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's allocator rounds sizes up")


def _kilobytes(count: int) -> Tensor:
    return torch.ones(250 * count)


@counts_storages
def test_peak_is_what_is_alive_together() -> None:
    given = _kilobytes(7)

    def program() -> Tensor:
        first = given + 1  # 7
        second = first * 2  # 14
        del first  # 7
        second.view(-1).add_(1)  # views and in-place operators make nothing
        given.mul_(2)  # nor does writing to what was given
        third = torch.empty(250 * 3)  # 10
        fourth = torch.cat([third, third])  # 16: the peak
        del third, fourth  # 7
        return second + 1  # 14

    result, recorder = recorded(program)
    assert recorder.peak_bytes == 16 * KILOBYTE
    assert recorder.largest == 250 * 7
    assert result.numel() == 250 * 7


@counts_storages
def test_what_lives_on_is_counted_and_what_went_is_not() -> None:
    with Recorder() as recorder:
        kept = [_kilobytes(2) for _ in range(3)]
        assert recorder.peak_bytes == 6 * KILOBYTE
        kept.clear()
        for _ in range(100):
            _kilobytes(5)
        assert recorder.peak_bytes == 6 * KILOBYTE
        kept.append(_kilobytes(7))
    assert recorder.peak_bytes == 7 * KILOBYTE


@counts_storages
def test_backward_pass_is_seen() -> None:
    leaf = _kilobytes(3).requires_grad_()

    def program() -> None:
        value = leaf.exp()  # 3, saved
        total = value.sum()  # 4 bytes
        total.backward()  # 4 bytes of ones, and the gradient of 3

    _, recorder = recorded(program)
    assert leaf.grad is not None
    assert recorder.peak_bytes == 6 * KILOBYTE + 8


def _collectives() -> tuple[list[tuple[str, int]], int]:
    def program() -> None:
        mine = torch.ones(2, 3)
        dist.all_gather([torch.empty(2, 3) for _ in range(2)], mine)
        dist.all_gather_into_tensor(torch.empty(4, 3), mine)
        dist.all_reduce(torch.ones(5))

    _, recorder = recorded(program)
    return recorder.collectives, recorder.words


def test_collectives_and_their_words() -> None:
    for collectives, words in run_ranks(2, _collectives):
        assert [elements for _, elements in collectives] == [6, 6, 5]
        assert [name for name, _ in collectives] == ["allgather_", "_allgather_base_", "allreduce_"]
        assert words == 17
