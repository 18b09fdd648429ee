"""The order of prompts for a method that says how much there is to learn from each."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from astar_megatron.data.prompts import check_same_prompts, digest_of_prompts
from astar_megatron.data.rows import PromptError
from astar_megatron.types import Prompt


class PrioritisedPrompts:
    """Batches of different prompts, drawn with chances in proportion to `priorities` at the time, times `weights`.

    Without replacement by the keys ln(u) / weight of Efraimidis and Spirakis (Inf. Process. Lett. 97, 2006). The u of
    a prompt's batches are a generator SplitMix64 (Steele and others, OOPSLA 2014) begun at a digest of (seed, uid): so
    a batch depends on these, its number and the priorities alone. As PromptStream else.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        batch_size: int,
        seed: int,
        priorities: Callable[[Sequence[str]], Sequence[float]],
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self._weights = weights or {}
        self._prompts = sorted(
            (prompt for prompt in prompts if self._weights.get(prompt.uid, 1.0) > 0), key=lambda prompt: prompt.uid
        )
        if not 1 <= batch_size <= len(self._prompts):
            raise PromptError(
                f"train.batch_size: expected 1 to {len(self._prompts)} prompts a batch, as many as there are to choose "
                f"from, got {batch_size}; a method that chooses its prompts takes each once a batch"
            )
        self._uids = [prompt.uid for prompt in self._prompts]
        self._batch_size, self._seed, self._priorities = batch_size, seed, priorities
        self._digest = digest_of_prompts(self._uids, self._weights)
        digests = (hashlib.blake2b(f"{seed}:{uid}".encode(), digest_size=8).digest() for uid in self._uids)
        self._begin = np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64)
        self._weight = np.array([self._weights.get(uid, 1.0) for uid in self._uids])
        self._batch = 0

    def take(self) -> list[Prompt]:
        """Return the next `batch_size` prompts."""
        chance = np.asarray(self._priorities(self._uids), dtype=np.float64) * self._weight
        self._batch += 1
        keys = np.log(_uniform(self._begin, self._batch)) / chance
        chosen = np.argpartition(-keys, self._batch_size - 1)[: self._batch_size]
        chosen.sort()  # by uid: no mini-batch has more of the likelier ones
        return [self._prompts[i] for i in chosen]

    def state(self) -> dict[str, int | str]:
        """Return the cursor, ready for JSON; the priorities are their method's to keep."""
        return {"seed": self._seed, "batch": self._batch, "prompts": self._digest}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken. Raises PromptError for other prompts, another seed or order."""
        check_same_prompts(state, self._seed, self._digest)
        batch = state.get("batch")
        if not isinstance(batch, int) or batch < 0:
            raise PromptError(
                f"prompts: expected a cursor of prioritised prompts, got {dict(state)!r}; continue with the "
                "objective.name it was saved with, or start a new run_dir"
            )
        self._batch = batch


def _uniform(begin: np.ndarray, index: int) -> np.ndarray:
    """Return [P] float64 between 0 and 1: of each generator SplitMix64 that begins at `begin` the number `index`."""
    bits = begin + np.uint64(index * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    return (bits.astype(np.float64) + 0.5) / 2**64
