"""What passes between the parts: prompts, rollouts, the packed batch, the statistics of a step.

Legend: B sequences, T packed tokens.
"""

from dataclasses import dataclass, field

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
    weights that drew it: the number of optimiser batches behind them.
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
    reward: torch.Tensor  # [B]
    v_star: torch.Tensor  # [B]
    rollout_logprob: torch.Tensor  # [B], the engine's, nats
    version: int

    def __len__(self) -> int:
        return len(self.token_ids)

    def response_tokens(self) -> int:
        return sum(len(ids) - n for ids, n in zip(self.token_ids, self.prompt_tokens, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOptions:
    """How a step is computed: the regression's beta2, the sampling temperature, sequences and tokens at a time."""

    beta2: float
    temperature: float
    mini_batch_size: int  # sequences an optimiser step, over all data-parallel ranks
    micro_batch_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """What one training step did, over its B sequences.

    `logratio` is D = ln pi - ln pi_ref of a whole response (nats). `seconds` holds reference (its forward) and policy
    (forward, backward, optimiser).
    """

    loss: float
    grad_norm: float
    logratio_mean: float
    logratio_std: float
    logratio_max: float  # of |D|: exactly 0 before the first optimiser step
    slope: float  # of the line of beta2 * D on r - V*: 1 at the objective's optimum, NaN where all r - V* are equal
    r_squared: float  # of that line
    engine_gap: float  # mean of ln pi by the policy minus by the engine, over the first mini-batch: the same weights
    tokens: int
    response_tokens: int
    seconds: dict[str, float] = field(default_factory=dict)
