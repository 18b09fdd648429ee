"""That engines compute with the weights that they hold: greedy tokens, by their decode path, scored by the policy.

Digests say what lies in an engine's parameters. A captured graph, or another copy of a weight, can still be old then
(vLLM RFC 48312): its log-probs tell.
"""

from collections.abc import Sequence
from typing import Protocol

from astar_megatron.cluster.errors import ClusterError
from astar_megatron.config import SamplingConfig
from astar_megatron.rollout.engine import Response
from astar_megatron.rollout.source import Engines
from astar_megatron.run.certificate import LOGPROB_LIMITS, fixed_sequences
from astar_megatron.types import Prompt, Request

_TOKENS = 16  # of the prompt at most, and of the response
_POLL_SECONDS = 1.0


class Policy(Protocol):
    """What the check needs of a policy; see PolicyGroup."""

    dtype: str

    def logprobs(self, token_ids: Sequence[Sequence[int]], prompt_tokens: Sequence[int]) -> list[list[float]]: ...


class StaleEngine(ClusterError):  # noqa: N818  it is what the engine is
    """An engine that holds the weights that it was sent and computes with others."""


def check_decoding(engines: Engines, policy: Policy, version: int, vocab_size: int, max_tokens: int) -> float | None:
    """Return the largest difference (nats) of a token's log-prob between an engine and the policy, both of `version`.

    None: an engine is being replaced, and was not asked.
    `max_tokens` are those of prompt and response that an engine takes. Raises StaleEngine above the limit of the type.
    """
    length = max(1, min(_TOKENS, max_tokens - _TOKENS))
    prompt = Prompt(uid="", token_ids=tuple(fixed_sequences(vocab_size, _TOKENS)[-1][:length]), text="", answer="")
    sampling = SamplingConfig(max_response_tokens=min(_TOKENS, max_tokens - length))
    answers = {index: _greedy(engines, index, prompt, sampling) for index in engines.serving()}
    answers = {index: answer for index, answer in answers.items() if answer is not None}
    sequences = [prompt.token_ids + answer.token_ids for answer in answers.values()]
    scores = policy.logprobs(sequences, [len(prompt.token_ids)] * len(answers)) if answers else []
    limit, largest = LOGPROB_LIMITS[policy.dtype], 0.0
    for (index, answer), expected in zip(answers.items(), scores, strict=True):
        gaps = [abs(own - other) for own, other in zip(answer.token_logprobs, expected, strict=True)]
        largest = max(largest, *gaps)
        if not all(gap <= limit for gap in gaps):  # NaN is not either
            raise StaleEngine(
                f"weights of version {version}: engine {index} holds them bit by bit, but does not compute with them: "
                f"log-probs of {len(gaps)} greedy tokens differ from the policy's by up to {max(gaps):.3g} nats, more "
                f"than {limit:g}. A captured graph or another copy of a weight is old: set rollout.graphs=none and run "
                "the same command again, and report this"
            )
    return largest if len(answers) == len(engines) else None


def _greedy(engines: Engines, index: int, prompt: Prompt, sampling: SamplingConfig) -> Response | None:
    """The response of an engine; None if it ended before."""
    request = Request(prompt=prompt, sample=0, seed=0, greedy=True)
    stream, answers = engines.generate(index, [(0, request)], sampling), []
    while True:
        for _, responses in engines.responses([stream], _POLL_SECONDS):
            if responses is None:
                return answers[0] if answers else None
            answers += responses
