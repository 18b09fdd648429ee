"""That engines compute with the weights that they hold: greedy tokens, by their decode path, scored by the policy.

Digests say what lies in an engine's parameters. A captured graph, or another copy of a weight, can still be old then
(vLLM RFC 48312): the log-probs tell.
"""

import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from astar_megatron.cluster.errors import ClusterError
from astar_megatron.config import SamplingConfig
from astar_megatron.rollout.engine import Response
from astar_megatron.rollout.source import Engines
from astar_megatron.run.certificate import fixed_sequences
from astar_megatron.types import Prompt, Request

# Nats that two right programs may differ by on one greedy token. Of float32 ten times what an export's certificate
# allows, which scales its limit by the largest logit: that is not known here.
_LIMITS = {"float32": 1e-2, "bfloat16": 1.0}
_TOKENS = 16  # of the prompt at most, and of the response
_POLL_SECONDS = 1.0
_MOST_REPEATS = 3  # of an answer: one small step of a small model may leave the log-probs as they were


class Policy(Protocol):
    """What the check needs of a policy; see PolicyGroup."""

    @property
    def dtype(self) -> str: ...

    def logprobs(self, token_ids: Sequence[Sequence[int]], prompt_tokens: Sequence[int]) -> list[list[float]]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """What an engine answered with which weights; whether another answer came with others, or how often the same."""

    answer: Response
    weights: Hashable
    has_followed: bool = False
    repeats: int = 0


class StaleEngine(ClusterError):  # noqa: N818  it is what the engine is
    """An engine that holds the weights that it was sent and computes with others."""


class DecodePath:
    """Looks at the decode path of all engines after each publish, until each has followed a change of its weights.

    Two signs: log-probs of greedy tokens are the policy's, within what the type rounds; and they are not, to the last
    bit, those that the engine had before the weights changed, which a stale path repeats. The second sees a change that
    the first does not: one step moves log-probs by less than bfloat16 rounds. Requests in flight beside (drawing ahead)
    can move them too, and then a stale path is seen by the first alone. `max_tokens` are those of prompt and response
    that an engine takes.
    """

    def __init__(self, vocab_size: int, max_tokens: int) -> None:
        length = max(1, min(_TOKENS, max_tokens - _TOKENS))
        token_ids = tuple(fixed_sequences(vocab_size, _TOKENS)[-1][:length])
        self._prompt = Prompt(uid="", token_ids=token_ids, text="", answer="")
        self._sampling = SamplingConfig(max_response_tokens=min(_TOKENS, max_tokens - length))
        self._changed = threading.Lock()  # guards what follows: `forget` is called in other threads
        self._seen: dict[int, _Seen] = {}  # by engine
        self._num_replaced = 0
        self.is_proved = False

    def forget(self, engine: int) -> None:
        """Hear that another engine has this index now."""
        with self._changed:
            self._num_replaced += 1
            self._seen.pop(engine, None)
            self.is_proved = False

    def look(self, engines: Engines, policy: Policy, version: int, weights: Hashable) -> str:
        """Ask those engines that are not proved yet, which all have `version` of the policy; in words that now all are.

        `weights` differ where what was published differs. Raises StaleEngine.
        """
        if self.is_proved:
            return ""
        with self._changed:
            num_replaced = self._num_replaced
            proved = {index for index, seen in self._seen.items() if seen.has_followed}
        given = self._greedy(engines, [index for index in engines.serving() if index not in proved])
        largest = self._compare(given, policy, version) if given else 0.0
        with self._changed:
            if num_replaced != self._num_replaced:  # an answer may be of the engine that has ended
                return ""
            for index, answer in given.items():
                self._seen[index] = self._judge(index, self._seen.get(index), answer, version, weights)
            self.is_proved = sum(seen.has_followed for seen in self._seen.values()) == len(engines)
        if not self.is_proved:
            return ""
        return (
            f"engines compute with the weights of version {version}: greedy tokens within {largest:.1e} nats of the "
            "policy, and others than before"
        )

    def _compare(self, answers: Mapping[int, Response], policy: Policy, version: int) -> float:
        """Return the largest difference (nats) of a token's log-prob between an engine and the policy."""
        prompt = self._prompt.token_ids
        sequences = [prompt + answer.token_ids for answer in answers.values()]
        scores = policy.logprobs(sequences, [len(prompt)] * len(answers))
        limit, largest = _LIMITS[policy.dtype], 0.0
        for (index, answer), expected in zip(answers.items(), scores, strict=True):
            gaps = [abs(own - other) for own, other in zip(answer.token_logprobs, expected, strict=True)]
            largest = max(largest, *gaps)
            if not all(gap <= limit for gap in gaps):  # NaN is not either
                raise _stale(
                    index,
                    version,
                    f"log-probs of {len(gaps)} greedy tokens differ from the policy's by up to {max(gaps):.3g} nats, "
                    f"more than {limit:g}",
                )
        return largest

    @staticmethod
    def _judge(index: int, before: "_Seen | None", answer: Response, version: int, weights: Hashable) -> "_Seen":
        if before is None:
            return _Seen(answer=answer, weights=weights)
        if before.has_followed or before.weights == weights:
            return before
        if (answer.token_ids, answer.token_logprobs) != (before.answer.token_ids, before.answer.token_logprobs):
            return _Seen(answer=answer, weights=weights, has_followed=True)
        if before.repeats + 1 == _MOST_REPEATS:
            raise _stale(
                index,
                version,
                f"in {_MOST_REPEATS} changes of the weights log-probs of {len(answer.token_ids)} greedy tokens have "
                "stayed the same to the last bit",
            )
        return _Seen(answer=answer, weights=weights, repeats=before.repeats + 1)

    def _greedy(self, engines: Engines, indices: Sequence[int]) -> dict[int, Response]:
        """The responses of engines that are asked all at once, by index; without those that end before."""
        request = Request(prompt=self._prompt, sample=0, seed=0, greedy=True)
        streams = {engines.generate(index, [(index, request)], self._sampling) for index in indices}
        given: dict[int, Response] = {}
        while streams:
            for stream, responses in engines.responses(list(streams), _POLL_SECONDS):
                if responses is None:
                    streams.discard(stream)
                given |= {response.tag: response for response in responses or ()}
        return dict(sorted(given.items()))


def _stale(index: int, version: int, sign: str) -> StaleEngine:
    return StaleEngine(
        f"weights of version {version}: engine {index} holds them bit by bit, but does not compute with them: {sign}. "
        "A captured graph or another copy of a weight is old: set rollout.graphs=none and run the same command again, "
        "and report this"
    )
