"""On a tabular policy each method's gradient or fixed point is what its paper says."""

import itertools
import math

import pytest
import torch
from tabular import kl, losses_of, optimum, reward_gradient, table
from torch import Tensor

from astar_megatron.algorithm.astar import AstarLoss
from astar_megatron.algorithm.clipped import ClippedLoss
from astar_megatron.algorithm.grpo import group_advantages
from astar_megatron.algorithm.oapl import OaplLoss
from astar_megatron.algorithm.rebel import RebelLoss
from astar_megatron.algorithm.value import v_star

BETA = 0.3
GRADIENT = ClippedLoss(clip_low=0.2, clip_high=0.28, kl_coef=0.0)


def value_of(reference: Tensor, rewards: Tensor) -> Tensor:
    return BETA * torch.logsumexp(reference + rewards / BETA, dim=-1, keepdim=True).expand_as(rewards)


def samples(logprobs: Tensor, number: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Prompts [prompts * number] and responses drawn for them."""
    drawn = torch.multinomial(logprobs.exp(), number, replacement=True, generator=random)
    return torch.arange(len(logprobs)).repeat_interleave(number), drawn.flatten()


def test_astar_trained_on_its_own_samples_reaches_the_optimum_of_the_objective() -> None:
    reference, rewards = table(0)
    advantage = rewards - value_of(reference, rewards)
    logits, random = reference.clone().requires_grad_(), torch.Generator().manual_seed(1)
    adam = torch.optim.Adam([logits], lr=0.05)
    loss = AstarLoss(beta2=BETA)
    for _ in range(1500):
        at = samples(logits.detach().log_softmax(-1), 32, random)
        columns = {"reward": advantage[at], "v_star": torch.zeros(len(at[0]))}
        logprobs = logits.log_softmax(-1)[at]
        adam.zero_grad()
        losses_of(loss, logprobs, columns, reference=reference[at]).mean().backward()
        adam.step()
    assert kl(reference, optimum(reference, rewards, BETA)) > 0.1
    assert kl(logits.detach().log_softmax(-1), optimum(reference, rewards, BETA)) < 1e-3


def test_oapl_trained_on_samples_of_an_old_policy_reaches_the_optimum_against_that_policy() -> None:
    old, rewards = table(2)
    logits, random = old.clone().requires_grad_(), torch.Generator().manual_seed(3)
    adam = torch.optim.Adam([logits], lr=0.05)
    for _ in range(1500):
        at = samples(old, 32, random)  # never of the policy that learns
        columns = {"advantage": (rewards - value_of(old, rewards))[at], "engine_logprob": old[at]}
        adam.zero_grad()
        losses_of(OaplLoss(beta2=BETA), logits.log_softmax(-1)[at], columns).mean().backward()
        adam.step()
    assert kl(old, optimum(old, rewards, BETA)) > 0.1
    assert kl(logits.detach().log_softmax(-1), optimum(old, rewards, BETA)) < 1e-3


def oapl_with_lag(lag: int, seed: int) -> float:
    """The expected reward, of 0 and 1, after training in which each step's groups are `lag` versions old."""
    reference, rewards = binary_table()
    logits, random = reference.clone().requires_grad_(), torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam([logits], lr=0.05)
    versions = [reference]
    for step in range(250):
        old = versions[max(0, step - lag)]
        at = samples(old, 8, random)
        value = v_star(rewards[at].view(8, 8), 1.0).repeat_interleave(8)
        columns = {"advantage": rewards[at] - value, "engine_logprob": old[at]}
        adam.zero_grad()
        losses_of(OaplLoss(beta2=1e-3), logits.log_softmax(-1)[at], columns).mean().backward()
        adam.step()
        versions.append(logits.detach().log_softmax(-1))
    return float((versions[-1].exp() * rewards).sum(-1).mean())


def binary_table() -> tuple[Tensor, Tensor]:
    reference, rewards = table(4, prompts=8)
    return reference, (rewards > 0.6).double()


def test_oapl_ends_with_a_lag_of_64_versions_where_it_does_without() -> None:
    """But for a standard error of the mean of a step's 64 rewards, which is what a curve of training shows."""
    reference, rewards = binary_table()
    ends = {lag: sum(oapl_with_lag(lag, seed) for seed in range(4)) / 4 for lag in (0, 4, 64)}
    error = math.sqrt(ends[0] * (1 - ends[0]) / 64)
    assert float((reference.exp() * rewards).sum(-1).mean()) < 0.5 and ends[0] > 0.98
    assert abs(ends[4] - ends[0]) < error and abs(ends[64] - ends[0]) < error


def expected_over_groups(loss_of_group: object, logits: Tensor, size: int) -> Tensor:
    """The gradient of a loss of one prompt's groups of `size` responses, exactly, over all that the policy may draw."""
    policy, total = logits.detach().softmax(-1)[0], torch.zeros_like(logits)
    for drawn in itertools.product(range(logits.shape[1]), repeat=size):
        chance = policy[list(drawn)].prod()
        total += chance * torch.autograd.grad(loss_of_group(torch.tensor(drawn)), logits)[0]  # type: ignore[operator]
    return total


def test_the_expected_gradient_of_grpo_is_that_of_the_reward_but_for_what_its_own_mean_takes() -> None:
    reference, rewards = table(5, prompts=1, responses=4)
    logits = reference.clone().requires_grad_()

    def loss_of_group(drawn: Tensor) -> Tensor:
        advantage = group_advantages(rewards[0, drawn][None], normalise=False)[0]
        columns = {"advantage": advantage, "token_weight": torch.ones(3)}
        return losses_of(GRADIENT, logits.log_softmax(-1)[0, drawn], columns).mean()

    gradient = expected_over_groups(loss_of_group, logits, 3)
    torch.testing.assert_close(gradient, -(2 / 3) * reward_gradient(logits, rewards), rtol=1e-5, atol=1e-7)


def test_the_expected_gradient_of_rebel_at_the_old_policy_is_that_of_the_reward() -> None:
    reference, rewards = table(6, prompts=1, responses=4)
    logits, loss = reference.clone().requires_grad_(), RebelLoss(eta=2.5)

    def loss_of_pair(drawn: Tensor) -> Tensor:
        reward, zeros = rewards[0, drawn], torch.zeros(2)
        columns = {"reward": reward, "peer_reward": reward.flip(0), "peer_shift": zeros}
        return loss.gradient_scale * losses_of(loss, logits.log_softmax(-1)[0, drawn], columns).mean()

    gradient = expected_over_groups(loss_of_pair, logits, 2)
    torch.testing.assert_close(gradient, -(4 / 2.5) * reward_gradient(logits, rewards), rtol=1e-5, atol=1e-7)


def test_rebel_regressed_on_all_pairs_reaches_the_old_policy_times_e_to_the_eta_r() -> None:
    old, rewards = table(7, prompts=1, responses=6)
    logits, loss = old.clone().requires_grad_(), RebelLoss(eta=2.5)
    pairs = torch.tensor(list(itertools.product(range(6), repeat=2)))
    weight = old[0, pairs].sum(-1).exp()
    drawn, reward = pairs.flatten(), rewards[0, pairs]
    adam = torch.optim.Adam([logits], lr=0.05)
    for _ in range(800):
        logprobs = logits.log_softmax(-1)[0, drawn]
        shift = (logprobs.detach() - old[0, drawn]).view(-1, 2).flip(1).flatten()
        columns = {"reward": reward.flatten(), "peer_reward": reward.flip(1).flatten(), "peer_shift": shift}
        adam.zero_grad()
        losses = losses_of(loss, logprobs, columns, old=old[0, drawn])
        (losses.view(-1, 2).sum(1) * weight).sum().backward()
        adam.step()
    assert kl(logits.detach().log_softmax(-1), optimum(old, rewards, 1 / 2.5)) < 1e-3


@pytest.mark.parametrize("value", [0.0, 0.4, 3.0])
def test_the_expected_gradient_of_a_single_stream_is_that_of_the_reward_whatever_the_value_is(value: float) -> None:
    reference, rewards = table(8)
    logits = reference.clone().requires_grad_()
    logprobs = logits.log_softmax(-1).flatten()
    columns = {"advantage": (rewards - value).flatten(), "token_weight": torch.ones(35)}
    expected = (logprobs.detach().exp() * losses_of(GRADIENT, logprobs, columns)).sum() / 5
    (gradient,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(gradient, -reward_gradient(logits, rewards), rtol=1e-5, atol=1e-7)


def test_a_clipped_token_has_no_gradient_where_the_ratio_has_gone_far_enough() -> None:
    old = torch.tensor([-1.0, -1.0, -1.0, -1.0])
    logprobs = (old + torch.tensor([0.30, 0.30, -0.30, -0.30])).requires_grad_()  # ratios 1.35 and 0.74
    columns = {"advantage": torch.tensor([1.0, -1.0, 1.0, -1.0]), "token_weight": torch.ones(4)}
    losses = losses_of(GRADIENT, logprobs, columns, old=old)
    (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
    assert losses.tolist() == pytest.approx([-1.28, math.exp(0.3), -math.exp(-0.3), 0.8])
    assert gradient.tolist() == pytest.approx([0.0, math.exp(0.3), -math.exp(-0.3), 0.0])
