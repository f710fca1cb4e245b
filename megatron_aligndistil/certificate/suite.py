"""All checks of one layout: every kernel and every algorithm, in every plan, chunk size and number type asked for."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch

from megatron_aligndistil.certificate.algorithms import ALGORITHM_CHECKS
from megatron_aligndistil.certificate.findings import Bounds, Finding, worst_over_ranks
from megatron_aligndistil.certificate.kernel_problem import ERROR_BOUND, Expected, KernelProblem, bounds, exact, measure
from megatron_aligndistil.certificate.kernels import KERNELS, KernelCheck
from megatron_aligndistil.certificate.models import World, architecture_for
from megatron_aligndistil.certificate.sharded import Case, ShardedWorld, layout_name
from megatron_aligndistil.config.base_schema import KernelConfig
from megatron_aligndistil.kernels.settings import KernelSettings
from megatron_aligndistil.parallel import collectives, groups
from megatron_aligndistil.parallel.setup import Layout

logger = logging.getLogger(__name__)

TOKENS = 29
PLANS = ("store", "recompute")
CHUNKS = (5, None)  # does not divide TOKENS; as the kernel chooses
DTYPES = {"64": torch.float64, "32": torch.float32, "bf16-mixed": torch.bfloat16}
DTYPE_NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Request:
    """What is certified. Every precision where it is None; every one of PLANS for "auto", of CHUNKS for None."""

    layout: Layout
    micro_batch_size: int = 4
    packed: bool = False
    precision: str | None = None
    kernel: KernelConfig = field(default_factory=KernelConfig)

    @property
    def dtypes(self) -> list[torch.dtype]:
        """The number types to check."""
        return list(DTYPES.values()) if self.precision is None else [DTYPES[self.precision]]

    @property
    def _plans(self) -> tuple[str, ...]:
        return PLANS if self.kernel.plan == "auto" else (self.kernel.plan,)

    @property
    def _chunks(self) -> tuple[int | None, ...]:
        return CHUNKS if self.kernel.chunk_tokens is None else (self.kernel.chunk_tokens,)

    def every_kernel(self) -> Iterator[KernelConfig]:
        """Every plan with every chunk size."""
        for plan in self._plans:
            for chunk in self._chunks:
                yield replace(self.kernel, plan=plan, chunk_tokens=chunk)

    def forward_kernels(self) -> Iterator[KernelConfig]:
        """Every chunk size, for what has no backward pass to plan."""
        for chunk in self._chunks:
            yield replace(self.kernel, plan=self._plans[0], chunk_tokens=chunk)

    def step_kernels(self) -> Iterator[KernelConfig]:
        """Every plan and every chunk size, each at least once: for whole steps."""
        plans, chunks = self._plans, self._chunks
        for i in range(max(len(plans), len(chunks))):
            yield replace(self.kernel, plan=plans[i % len(plans)], chunk_tokens=chunks[i % len(chunks)])


def certify(request: Request) -> list[Finding]:
    """Every check's worst finding over the ranks, the same on each. Every rank of the layout calls it."""
    findings = list(_kernel_findings(request))
    logger.info("%d checks of kernels done", len(findings))
    findings += _algorithm_findings(request)
    logger.info("%d checks of kernels and algorithms done", len(findings))
    return worst_over_ranks(collectives.gather_objects(findings))


def _problems(request: Request, dtype: torch.dtype) -> list[KernelProblem]:
    """An odd vocabulary; and one that leaves all shards but the first to padding, at another temperature."""
    tensor, scattered = request.layout.tensor, request.layout.sequence_parallel
    tokens = math.ceil(TOKENS / tensor) * tensor if scattered else TOKENS
    return [
        KernelProblem(tokens, 509, math.lcm(512, tensor), dtype, scattered),
        KernelProblem(tokens, 13, 16 * tensor, dtype, scattered, temperature=0.7),
    ]


def _kernel_findings(request: Request) -> Iterator[Finding]:
    layout = layout_name(request.layout, groups.world().size)
    for dtype in request.dtypes:
        problems = _problems(request, dtype)
        for name, check in KERNELS.items():
            judged = [(problem, *_expectation(check, problem)) for problem in problems]
            for kernel in request.every_kernel() if check.backward else request.forward_kernels():
                settings = KernelSettings.of(kernel)
                plan = f"{kernel.plan} " if check.backward else ""
                place = f"{layout} {DTYPE_NAMES[dtype]} {plan}{_chunk(kernel)}"
                yield _worst(
                    Finding.judged(name, place, measure(check, problem, expected, settings), allowed)
                    for problem, expected, allowed in judged
                )


def _expectation(check: KernelCheck, problem: KernelProblem) -> tuple[Expected, Bounds]:
    expected = exact(check, problem)
    return expected, bounds(check, problem, expected)


def _algorithm_findings(request: Request) -> Iterator[Finding]:
    heads = (True, False)  # tied to the embedding or not
    worlds = {tied: World(architecture_for(request.layout, tied), _examples(request)) for tied in heads}
    # Whole gradients and the world's loss are on rank 0.
    first = groups.world().rank == 0
    references = {
        (name, tied): check.reference(worlds[tied]) if first else None
        for name, check in ALGORITHM_CHECKS.items()
        for tied in heads
    }
    for dtype in (dtype for dtype in request.dtypes if dtype in ERROR_BOUND):
        case = Case(request.layout, groups.world().size, request.micro_batch_size, request.packed, dtype)
        sharded = {tied: ShardedWorld(worlds[tied], replace(case, tied=tied)) for tied in heads}
        for name, check in ALGORITHM_CHECKS.items():
            bound = ERROR_BOUND[dtype]
            for kernel in request.step_kernels():
                place = f"{case} {DTYPE_NAMES[dtype]} {kernel.plan} {_chunk(kernel)}"
                answers = {tied: sharded[tied].step(check, kernel) for tied in heads}
                yield _worst(
                    Finding.judged(
                        name,
                        place,
                        answer.against(references[name, tied]),
                        Bounds(bound, bound, answer.words_due(check)),
                    )
                    for tied, answer in answers.items()
                )


def _chunk(kernel: KernelConfig) -> str:
    text = f"chunk {'auto' if kernel.chunk_tokens is None else kernel.chunk_tokens}"
    return text if kernel.backend == "auto" else f"{text} {kernel.backend}"


def _examples(request: Request) -> int:
    """Enough for two micro-batches a replica."""
    replicas = groups.world().size // request.layout.replica_size
    return max(8, 2 * request.micro_batch_size * replicas)


def _worst(findings: Iterable[Finding]) -> Finding:
    """One line for checks that differ in what the line doesn't say."""
    return worst_over_ranks([[finding] for finding in findings])[0]
