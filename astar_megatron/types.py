"""What passes between the parts: prompts, rollouts, the packed batch, the statistics of a step.

Legend: B sequences, T packed tokens.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # preparing prompts needs no torch
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question. `uid` is the digest of its tokens and answer: the same prompt has the same uid in every run."""

    uid: str
    token_ids: tuple[int, ...]
    text: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One response drawn for a prompt.

    `token_ids` are the response's, with its EOS where it ended by itself; `truncated` says that the token limit
    ended it. `logprob` is the engine's sum over the sampled tokens (nats). `version` is the policy version of the
    weights that drew it: the number of optimiser batches behind them. `reward` is None before it is scored, and where
    scoring failed.
    """

    prompt: Prompt
    sample: int
    seed: int
    token_ids: tuple[int, ...]
    text: str
    truncated: bool
    logprob: float
    version: int
    reward: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBatch:
    """The sequences of one step as the policy needs them.

    `token_ids[b]` is prompt + response of sequence b; `prompt_tokens[b]` how many of them are prompt. `reward`,
    `v_star` and `rollout_logprob` are [B] float64. All rollouts have the same `version`.
    """

    token_ids: tuple[tuple[int, ...], ...]
    prompt_tokens: tuple[int, ...]
    reward: "torch.Tensor"  # [B]
    v_star: "torch.Tensor"  # [B]
    rollout_logprob: "torch.Tensor"  # [B], the engine's, nats
    version: int

    def __len__(self) -> int:
        return len(self.token_ids)

    def response_lengths(self) -> "torch.Tensor":
        """How many tokens each response has, [B] int64."""
        import torch

        pairs = zip(self.token_ids, self.prompt_tokens, strict=True)
        return torch.tensor([len(ids) - prompt for ids, prompt in pairs])

    def response_tokens(self) -> int:
        return int(self.response_lengths().sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOptions:
    """How a step is computed: the regression's beta2, the sampling temperature, sequences and tokens at a time.

    With `importance_cap` each loss is weighed by min(cap, pi / the engine's pi) of its response: algorithm/loss.py.
    """

    beta2: float
    temperature: float
    mini_batch_size: int  # sequences an optimiser step, over all data-parallel ranks
    micro_batch_tokens: int
    importance_cap: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """How a batch stands to the objective, over its sequences; algorithm/metrics.py computes and explains it.

    D = ln pi - ln pi_ref of a whole response, A = r - V*. "On-policy": over the first mini-batch, whose log-probs are
    those of the weights that drew the rollouts.
    """

    logratio_mean: float  # of D, nats
    logratio_std: float
    logratio_p05: float
    logratio_p50: float
    logratio_p95: float
    logratio_max: float  # of |D|: exactly 0 before the first optimiser step
    kl_sequence: float  # nats a response, on-policy
    kl_token: float  # nats a response token, on-policy
    entropy: float  # nats a response token, on-policy
    residual_mean: float  # of beta2 * D - A, in units of the reward
    residual_std: float
    slope: float  # of the line of beta2 * D on A: 1 at the objective's optimum, NaN where all A are equal
    r_squared: float  # of that line


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats(Health):
    """What one training step did, over its B sequences.

    `seconds` holds reference (its forward) and policy (forward, backward, optimiser); tokens_per_second and mfu are of
    their sum. `logprobs` and `reference_logprobs` are the sums over each response (nats), `losses` those of sequences.
    """

    loss: float
    engine_gap: float  # mean of ln pi by the policy minus by the engine, over the first mini-batch: the same weights
    grad_norm: float  # mean over the mini-batches whose step was taken, NaN without any
    grad_norms: tuple[float, ...]  # of each mini-batch
    learning_rate: float
    changed_weights: float  # share of the weights, as they were before the step, that are not the reference's
    skipped: tuple[int, ...]  # mini-batches whose optimiser step was left out: a loss or a gradient was not finite
    tokens: int
    response_tokens: int
    tokens_per_second: float
    model_flops: float  # of the step, over all ranks: model/flops.py
    mfu: float | None  # model FLOPs a second over those the ranks could do at most; None where that is not known
    peak_memory_bytes: tuple[int, ...]  # of each rank since its start: the device's, on CPU the process's
    seconds: dict[str, float] = field(default_factory=dict)
    logprobs: tuple[float, ...]  # [B]
    reference_logprobs: tuple[float, ...]  # [B]
    losses: tuple[float, ...]  # [B]
