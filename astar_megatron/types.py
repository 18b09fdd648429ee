"""What passes between the parts: prompts, rollouts, the packed batch, the statistics of a step.

Legend: B sequences, T packed tokens.
"""

import math
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Self

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
class Request:
    """One response to draw. `sample` tells the responses to a prompt apart; `greedy` takes the likeliest token."""

    prompt: Prompt
    sample: int
    seed: int
    greedy: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One response drawn for a prompt.

    `token_ids` are the response's, with its EOS where it ended by itself; `truncated` says that the token limit
    ended it. `token_logprobs` are the engine's of each of them, after temperature and top-p (nats). A version is of the
    policy's weights, the number of optimiser batches behind them: no token was drawn before `first_version` or after
    `last_version`. `reward` is None before it is scored, and where scoring failed.
    """

    prompt: Prompt
    sample: int
    seed: int
    token_ids: tuple[int, ...]
    text: str
    truncated: bool
    token_logprobs: tuple[float, ...]
    first_version: int
    last_version: int
    tokens_by_version: tuple[int, ...] = ()  # drawn by each version from the first to the last; empty: all by the first
    reward: float | None = None
    failure_score: float = 0.0  # what it counts where scoring failed

    @classmethod
    def given(
        cls,
        prompt: Prompt,
        sample: int,
        token_ids: tuple[int, ...],
        text: str,
        *,
        truncated: bool,
        seed: int = 0,
        logprob: float = math.nan,
    ) -> Self:
        """Return a response of the reference that no engine of this run drew.

        Of its tokens' log-probs no more than the sum is known, if that: it stands at the first.
        """
        return cls(
            prompt=prompt,
            sample=sample,
            seed=seed,
            token_ids=token_ids,
            text=text,
            truncated=truncated,
            token_logprobs=(logprob, *(0.0,) * len(token_ids))[: len(token_ids)],
            first_version=0,
            last_version=0,
        )

    @property
    def logprob(self) -> float:
        """The engine's ln pi of the response (nats)."""
        return sum(self.token_logprobs)

    def older_tokens(self, version: int) -> int:
        """How many of the tokens were drawn by weights before `version`."""
        by_version = self.tokens_by_version or (len(self.token_ids),)
        return sum(by_version[: max(0, version - self.first_version)])

    @property
    def score(self) -> float:
        """The reward as training and evaluation count it, `failure_score` where scoring failed."""
        return self.failure_score if self.reward is None else self.reward


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBatch:
    """The sequences of one step as the policy needs them.

    `token_ids[b]` is prompt + response of sequence b; `prompt_tokens[b]` how many of them are prompt. The columns are
    what the objective's loss reads, by name: a number of each sequence, or of each response token of all sequences in
    order (algorithm/objective.py). `version` is of the weights that are trained on them.
    """

    token_ids: tuple[tuple[int, ...], ...]
    prompt_tokens: tuple[int, ...]
    columns: Mapping[str, "torch.Tensor"]  # [B] each
    token_columns: Mapping[str, "torch.Tensor"] = field(default_factory=dict)  # [response tokens] each
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
    """How a step is computed, beside the objective's loss: the sampling temperature, sequences and tokens at a time."""

    temperature: float
    mini_batch_size: int  # sequences an optimiser step, over all data-parallel ranks
    micro_batch_tokens: int


type Worker = Literal["driver", "ranks", "engines"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A part of a step, from `start` to `end` in seconds since the step's beginning; what came before it is negative.

    Of the ranks it is what they compute, of the engines that they draw, of the driver what it does or waits for.
    """

    name: str
    who: Worker
    start: float
    end: float


def seconds_of(spans: Iterable[Span]) -> dict[str, float]:
    """Return how long spans of each name took, together."""
    seconds: dict[str, float] = {}
    for span in spans:
        seconds[span.name] = seconds.get(span.name, 0.0) + span.end - span.start
    return seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """What one training step did, over its B sequences.

    `spans` hold reference (its forward), policy (forward, backward, optimiser) and critic, if there is one, from the
    beginning of the ranks' step; tokens_per_second and mfu are of their sum. `logprobs` and `reference_logprobs` are
    the sums over each response (nats), `losses` those of sequences. `token_logprobs` and `reference_token_logprobs` are
    of each token (nats, float32), response after response, as their mini-batch was trained on them.
    """

    loss: float
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
    spans: tuple[Span, ...]
    logprobs: tuple[float, ...]  # [B]
    reference_logprobs: tuple[float, ...]  # [B]
    token_logprobs: array[float]  # [response tokens]
    reference_token_logprobs: array[float]  # [response tokens]
    losses: tuple[float, ...]  # [B]
    critic: dict[str, float] = field(default_factory=dict)  # metrics of a method's critic, by name

    @property
    def seconds(self) -> dict[str, float]:
        """How long each part took."""
        return seconds_of(self.spans)


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveState:
    """How far a rank is with its part of a checkpoint; `problem` says in words why it could not write it."""

    done: bool
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """The file of a profiled step of one rank; `problem` says in words why there is none."""

    path: str
    num_bytes: int = 0
    problem: str = ""
