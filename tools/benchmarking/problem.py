"""Three models' last hidden states and heads, as the kernels' benchmark gives them to every implementation.

Shapes: T tokens, H hidden size, V vocabulary entries (of one rank's shard where a Problem has been sharded).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# alpha_t = ALPHA * TVD_t + EPSILON (paper Eq. 16).
ALPHA, EPSILON = 10.0, 1e-3
LOGIT_STD = 2.0
CORNER_TOKENS, CORNER_ENTRIES = 8, 64
TEACHER_DISTANCE = 0.2  # of the teachers' weights and hidden states, relative


@dataclass(frozen=True)
class Shape:
    """Tokens, hidden size and vocabulary of one benchmark, written ``T,H,V``."""

    tokens: int
    hidden: int
    vocab: int

    def __str__(self) -> str:
        return f"{self.tokens},{self.hidden},{self.vocab}"

    def product_flops(self) -> int:
        """FLOP of one head product, whole vocabulary."""
        return 2 * self.tokens * self.hidden * self.vocab


@dataclass(frozen=True)
class Model:
    """Hidden states [T, H] and the head (or its shard) [V, H]."""

    hidden_TH: Tensor
    weight_VH: Tensor

    def leaf(self) -> Model:
        """The same numbers as leaves that collect gradients; nothing is copied."""
        return Model(self.hidden_TH.detach().requires_grad_(), self.weight_VH.detach().requires_grad_())


@dataclass(frozen=True)
class Problem:
    """What every implementation is given: the policy, the DPO model (d), the reverse one (r), and weights of tokens.

    token_weight_T  [T] float32, what a token's divergence counts in the loss of two teachers; with one teacher every
                    token counts 1 / T, since not all peers take weights
    """

    policy: Model
    d: Model
    r: Model
    token_weight_T: Tensor
    vocab: int
    first_column: int = 0
    group: ProcessGroup | None = None

    @classmethod
    def make(cls, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Problem:
        """Random models that differ as a policy and its teachers do; logits have a standard deviation of 2."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device)

        base_hidden_TH, base_weight_VH = normal(shape.tokens, shape.hidden), normal(shape.vocab, shape.hidden)

        def model() -> Model:
            hidden_TH = normal(*base_hidden_TH.shape).mul_(TEACHER_DISTANCE).add_(base_hidden_TH)
            weight_VH = normal(*base_weight_VH.shape).mul_(TEACHER_DISTANCE).add_(base_weight_VH)
            return Model(hidden_TH.to(dtype), weight_VH.mul_(LOGIT_STD * shape.hidden**-0.5).to(dtype))

        policy, d, r = model(), model(), model()
        weight_T = normal(shape.tokens).exp_().div_(shape.tokens)
        return cls(policy, d, r, weight_T, shape.vocab)

    def shard(self, rank: int, group: ProcessGroup) -> Problem:
        """Rank ``rank``'s columns of every head, which are views."""
        size = self.vocab // group.size()
        rows = slice(rank * size, (rank + 1) * size)
        policy, d, r = (Model(model.hidden_TH, model.weight_VH[rows]) for model in (self.policy, self.d, self.r))
        return Problem(policy, d, r, self.token_weight_T, self.vocab, rows.start, group)

    def corner(self) -> Problem:
        """A few tokens and vocabulary entries of it, for a first call that loads libraries."""
        tokens = min(CORNER_TOKENS, self.policy.hidden_TH.shape[0])
        entries = min(CORNER_ENTRIES, self.policy.weight_VH.shape[0])
        models = (self.policy, self.d, self.r)
        policy, d, r = (Model(m.hidden_TH[:tokens], m.weight_VH[:entries]) for m in models)
        rank, ranks = (0, 1) if self.group is None else (self.group.rank(), self.group.size())
        return Problem(policy, d, r, self.token_weight_T[:tokens], ranks * entries, rank * entries, self.group)

    @property
    def even_weight(self) -> float:
        """What a token counts in the loss of one teacher."""
        return 1.0 / self.policy.hidden_TH.shape[0]
