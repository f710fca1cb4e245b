"""What the scalar policy gradients are in expectation, by summing over everything that could have been drawn.

The expectation over y_t of the token-level gradient is that of AlignDistil with constant weight β₀ / β, and the
sentence-level one is the gradient of the expected reward; losses and kernels are the real ones.

Shapes: N responses, T tokens of all of them, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_aligndistil.certificate import formulas
from megatron_aligndistil.kernels.extrapolated_kl import Extrapolation, Teacher, extrapolated_kl, teacher_scalars
from megatron_aligndistil.kernels.settings import KernelSettings
from megatron_aligndistil.kernels.token_logprob import token_logprob
from megatron_aligndistil.losses.aligndistil import aligndistil_loss, token_weights
from megatron_aligndistil.losses.policy_gradient import length_weights, policy_gradient_loss
from megatron_aligndistil.types import IGNORED_SEQUENCE, Batch, VocabHead
from tests.unit.kernels.problems import relative_error

SETTINGS = KernelSettings(backend="pytorch")
TOLERANCE = 1e-10
VOCAB, LENGTH, HIDDEN, END = 4, 3, 5, 0
BETA0, BETA = 0.1, 0.08

betas = st.floats(0.02, 0.5)
seeds = pytest.mark.parametrize("seed", range(5))


def rows_of(responses: list[tuple[int, ...]]) -> Batch:
    """One response a row, without prompts."""
    width = max(len(response) for response in responses)
    labels = torch.tensor([[*response, *[0] * (width - len(response))] for response in responses])
    lengths = torch.tensor([len(response) for response in responses])
    mask = torch.arange(width) < lengths[:, None]
    ids = torch.arange(len(responses))[:, None].where(mask, torch.tensor(IGNORED_SEQUENCE))
    origins = tuple(f"f:{n}" for n in range(len(responses)))
    return Batch(labels, labels, mask, torch.zeros_like(labels), ids, lengths, origins)


def kl_and_alpha(hidden: list[Tensor], heads: list[VocabHead], beta0: float, beta: float) -> tuple[Tensor, Tensor]:
    """KL(π_θ ‖ softmax(z_d + (β₀ / β)(z_d - z_r))) and β₀ / β of every token, [T] each; policy, d and r in order."""
    of_teachers = (hidden[1], heads[1], hidden[2], heads[2])
    scalars = teacher_scalars(*of_teachers, Extrapolation("constant", beta0 / beta, 1e-3, 1.0), SETTINGS)
    return extrapolated_kl(hidden[0], heads[0], Teacher(*of_teachers, scalars), SETTINGS).kl, scalars.alpha


def token_reward(logprobs: list[Tensor], beta0: float, beta: float) -> Tensor:
    """β₀ log π_d / π_r - β log π_θ / π_d, from the label's log-probs under policy, d and r."""
    policy_T, d_T, r_T = logprobs
    return beta0 * (d_T - r_T) - beta * (policy_T - d_T)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), betas, betas, st.sampled_from((0.3, 1.0, 4.0)), st.booleans())
def test_expected_token_gradient_is_aligndistils_at_every_position(
    seed: int, tokens: int, beta0: float, beta: float, scale: float, normalize_by_length: bool
) -> None:
    """Positions with logits of their own: the identity as head makes the hidden states the logits."""
    vocab, generator = 7, torch.Generator().manual_seed(seed)
    z_3TV = scale * torch.randn(3, tokens, vocab, generator=generator, dtype=torch.float64)
    head = VocabHead(torch.eye(vocab, dtype=torch.float64), vocab)
    policy_TV, batch = z_3TV[0].clone().requires_grad_(), rows_of([(0,) * tokens])
    hidden = [policy_TV, z_3TV[1], z_3TV[2]]

    expected_TV = torch.zeros(tokens, vocab, dtype=torch.float64)
    for drawn in range(vocab):
        labels_T = torch.full((tokens,), drawn)
        logprobs = [token_logprob(z_TV, head, labels_T, SETTINGS) for z_TV in hidden]
        chance_T = logprobs[0].detach().exp() * length_weights(batch, normalize_by_length)
        output = policy_gradient_loss(logprobs[0], token_reward(logprobs, beta0, beta), chance_T, 1)
        expected_TV += torch.autograd.grad(output.total, policy_TV)[0]

    kl_T, alpha_T = kl_and_alpha(hidden, [head] * 3, beta0, beta)
    distilled = aligndistil_loss(kl_T, token_weights(alpha_T, beta0, batch, normalize_by_length), 1)
    (gradient_TV,) = torch.autograd.grad(distilled.total, policy_TV)
    target_TV = formulas.extrapolated(z_3TV[1], z_3TV[1], z_3TV[2], alpha_T)
    dense = beta * formulas.kl(policy_TV, target_TV).sum() / (tokens if normalize_by_length else 1)
    (dense_TV,) = torch.autograd.grad(dense, policy_TV)
    for t in range(tokens):
        assert relative_error(expected_TV[t], gradient_TV[t]) <= TOLERANCE
        assert relative_error(expected_TV[t], dense_TV[t]) <= TOLERANCE


@dataclass(frozen=True)
class Recurrent:
    """A language model whose every next token depends on all before."""

    start_H: Tensor
    embedding_VH: Tensor
    mixing_HH: Tensor
    head_VH: Tensor

    @classmethod
    def random(cls, generator: torch.Generator) -> Recurrent:
        sizes = (HIDDEN,), (VOCAB, HIDDEN), (HIDDEN, HIDDEN), (VOCAB, HIDDEN)
        return cls(*(torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_() for size in sizes))

    @property
    def head(self) -> VocabHead:
        return VocabHead(self.head_VH, VOCAB)

    def hidden(self, batch: Batch) -> Tensor:
        """The states that predict the response tokens, [T, H]."""
        states = [self.start_H.expand(batch.n_sequences, -1)]
        for labels_N in batch.labels.T[:-1]:
            states.append(torch.tanh(states[-1] @ self.mixing_HH + self.embedding_VH[labels_N]))
        return torch.stack(states, 1)[batch.loss_mask]

    def gradient(self, total: Tensor) -> Tensor:
        """Of all parameters, in one vector."""
        leaves = (self.start_H, self.embedding_VH, self.mixing_HH, self.head_VH)
        return torch.cat([part.flatten() for part in torch.autograd.grad(total, leaves, retain_graph=True)])


class World:
    """Every response that a policy could draw, with its chance: of three tokens, or up to END if responses may end."""

    def __init__(self, seed: int, may_end: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.models = [Recurrent.random(generator) for _ in range(3)]
        self.policy = self.models[0]
        every = product(range(VOCAB), repeat=LENGTH)
        self.batch = rows_of(list(dict.fromkeys(until_end(y) if may_end else y for y in every)))
        self.hidden = [model.hidden(self.batch) for model in self.models]
        self.hidden[1:] = [hidden_TH.detach() for hidden_TH in self.hidden[1:]]
        self.heads = [model.head for model in self.models]
        labels_T = self.batch.response_labels
        self.logprobs = [token_logprob(h, w, labels_T, SETTINGS) for h, w in zip(self.hidden, self.heads, strict=True)]
        self.chance_N = self.batch.sum_by_sequence(self.logprobs[0]).exp()
        self.reward_T = token_reward(self.logprobs, BETA0, BETA)
        self.chance_T = self.chance_N.detach()[self.batch.response_sequence_ids]

    def over_response(self, counts: Callable[[int, int], bool]) -> Tensor:
        """For every token t the sum of the rewards at those s of its response for which ``counts(t, s)``, [T]."""
        reward, sums, first = self.reward_T.tolist(), [], 0
        for length in self.batch.response_lengths.tolist():
            sums += [sum(reward[first + s] for s in range(length) if counts(t, s)) for t in range(length)]
            first += length
        return torch.tensor(sums, dtype=torch.float64)

    def expected_policy_gradient(self, advantage_T: Tensor, normalize_by_length: bool = False) -> Tensor:
        """Of ``policy_gradient_loss``, with respect to the policy's parameters."""
        weight_T = self.chance_T * length_weights(self.batch, normalize_by_length)
        output = policy_gradient_loss(self.logprobs[0], advantage_T, weight_T, self.batch.n_sequences)
        return self.policy.gradient(output.total)

    def expected_aligndistil_gradient(self, normalize_by_length: bool) -> Tensor:
        """The same of ``aligndistil_loss`` with the constant weight β₀ / β (Eq. 18)."""
        kl_T, alpha_T = kl_and_alpha(self.hidden, self.heads, BETA0, BETA)
        weight_T = token_weights(alpha_T, BETA0, self.batch, normalize_by_length)
        return self.policy.gradient(aligndistil_loss(kl_T, self.chance_T * weight_T, self.batch.n_sequences).total)


def until_end(response: tuple[int, ...]) -> tuple[int, ...]:
    return response[: response.index(END) + 1] if END in response else response


@seeds
@pytest.mark.parametrize(("may_end", "responses"), [(False, 64), (True, 40)])
def test_the_world_is_whole(seed: int, may_end: bool, responses: int) -> None:
    world = World(seed, may_end)
    assert world.batch.n_sequences == responses
    assert world.chance_N.sum().item() == pytest.approx(1, rel=1e-14)


@seeds
@pytest.mark.parametrize(
    ("may_end", "normalize_by_length"), [(False, False), (False, True), (True, False)], ids=["plain", "mean", "ends"]
)
def test_expected_token_gradient_is_aligndistils_on_policy(seed: int, may_end: bool, normalize_by_length: bool) -> None:
    world = World(seed, may_end)
    actual = world.expected_policy_gradient(world.reward_T, normalize_by_length)
    assert relative_error(actual, world.expected_aligndistil_gradient(normalize_by_length)) <= TOLERANCE


@seeds
def test_a_length_that_the_token_decides_breaks_the_equality(seed: int) -> None:
    """1 / |y| is then part of what y_t earns, and the policy gradient sees it; AlignDistil's sum over v doesn't."""
    world = World(seed, may_end=True)
    actual = world.expected_policy_gradient(world.reward_T, True)
    assert relative_error(actual, world.expected_aligndistil_gradient(True)) > 1e-3


@seeds
@pytest.mark.parametrize("may_end", [False, True])
def test_sentence_gradient_is_that_of_the_return_to_go_and_of_the_expected_reward(seed: int, may_end: bool) -> None:
    """Rewards before t drop out, and so does the gradient of -β log π_θ inside the reward itself."""
    world = World(seed, may_end)
    sentence = world.expected_policy_gradient(world.over_response(lambda t, s: True))
    to_go = world.expected_policy_gradient(world.over_response(lambda t, s: s >= t))
    whole = world.policy.gradient(-(world.chance_N * world.batch.sum_by_sequence(world.reward_T)).sum())
    assert relative_error(sentence, whole) <= TOLERANCE
    assert relative_error(to_go, whole) <= TOLERANCE


@seeds
@pytest.mark.parametrize("may_end", [False, True])
def test_the_token_gradient_lacks_the_later_rewards(seed: int, may_end: bool) -> None:
    world = World(seed, may_end)
    sentence = world.expected_policy_gradient(world.over_response(lambda t, s: True))
    later = world.expected_policy_gradient(world.over_response(lambda t, s: s > t))
    token = world.expected_policy_gradient(world.reward_T)
    assert relative_error(token + later, sentence) <= TOLERANCE
    assert relative_error(token, sentence) > 1e-3
