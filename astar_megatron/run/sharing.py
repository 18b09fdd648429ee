"""Turns on memory that policy and engines share: while one side computes, the other has given its memory back.

    policy steps      engines asleep: no weights, keys or values
    weights move      policy has given back what `train.offload` names; engines have room for weights
    engines generate  and for keys and values

Each side says what it gave back. Where that shrinks from turn to turn, or what a rank still has grows, somebody keeps
memory that the other side will miss, soon and in the middle of a step: it is named at once.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

from astar_megatron.cluster.errors import ClusterError
from astar_megatron.config import Offload
from astar_megatron.run.resources import GIB, gib

# That a residue may grow by, over a whole run. A rank's is counted from the turn after its first step: until then it
# takes for good, once, two buckets for weights, products' workspaces and, with Transformer Engine, a stand-in for the
# gradient of each shape of weight.
GROWTH_BYTES = GIB


class Policy(Protocol):
    """What the turns need of a policy; see PolicyGroup."""

    def release(self, offload: Offload) -> list[tuple[int, int]]: ...

    def resume(self) -> None: ...

    def restart(self) -> None: ...


class Engines(Protocol):
    """What the turns need of engines; see EnginePool."""

    def __len__(self) -> int: ...

    def sleep(self) -> dict[int, int]: ...

    def wake(self, part: Literal["weights", "kv_cache"]) -> None: ...


class Turns:
    """Whose turn it is: at first the policy's, while engines sleep that have given `returned` bytes back, by index.

    `say` hears what each side gives back at first.
    """

    def __init__(
        self,
        policy: Policy,
        engines: Engines,
        offload: Offload,
        say: Callable[[str], None],
        returned: Mapping[int, int],
    ) -> None:
        self._policy, self._engines, self._say = policy, engines, say
        self._offload: Offload = offload
        self._turn: Literal["training", "publishing", "generating"] = "training"
        self._first_kept: list[int] = []  # bytes of each rank's device, after it gave back what its first step took
        self._first_returned = dict(returned)
        self._kept: Sequence[int] = ()
        self._returned = dict(returned)
        say(f"shared memory: engines give back {' '.join(map(gib, returned.values()))}")

    def begin_publishing(self) -> None:
        """The policy gives back, engines have room for weights. Raises ClusterError for a residue that grows."""
        if self._turn == "training":
            self._check_policy(self._policy.release(self._offload))
            self._engines.wake("weights")
            self._turn = "publishing"

    def begin_generating(self) -> None:
        """Engines, which have their weights, get room for keys and values."""
        if self._turn == "publishing":
            self._engines.wake("kv_cache")
            self._turn = "generating"

    def begin_training(self) -> None:
        """Engines give back and lose their weights, the policy has all of its memory."""
        if self._turn == "generating":
            self._put_engines_to_sleep()
            self._policy.resume()

    def restart_policy(self) -> None:
        """Engines give back, and ranks start that take the place of all there were; it is their turn."""
        self.begin_generating()  # engines sleep as a whole
        if self._turn == "generating":
            self._put_engines_to_sleep()
        self._policy.restart()
        self._kept, self._first_kept = (), []  # these have not taken a first step yet

    def measured(self) -> dict[str, object]:
        """Return what a step's metrics say of memory: bytes that ranks kept and engines gave back, in their last turn.

        Each is a list, by rank or by index of the engine; an engine that was just being replaced gave nothing (None).
        """
        returned = [self._returned.get(engine) for engine in range(len(self._engines))]
        return {"kept_bytes": list(self._kept), "returned_bytes": returned}

    def _put_engines_to_sleep(self) -> None:
        self._check_engines(self._engines.sleep())
        self._turn = "training"  # even if a rank ends before it has its memory: engines don't sleep twice

    def _check_policy(self, given: Sequence[tuple[int, int]]) -> None:
        is_first, kept = not self._kept, [bytes_kept for _, bytes_kept in given]
        self._kept = kept
        if is_first:
            released = " ".join(gib(bytes_released) for bytes_released, _ in given)
            self._say(
                f"shared memory: ranks give back {released} of tensors (train.offload={self._offload}), keep "
                f"{' '.join(map(gib, kept))} of their GPUs"
            )
            return
        self._first_kept = self._first_kept or kept
        for rank, (now, first) in enumerate(zip(kept, self._first_kept, strict=True)):
            if now > first + GROWTH_BYTES:
                raise ClusterError(
                    f"memory of shared GPUs: policy rank {rank} kept {gib(first)} after its first step, and keeps "
                    f"{gib(now)} now, {gib(GROWTH_BYTES)} is the most that may come on top: engines would not find "
                    f"their room. Set train.offload=all (it is {self._offload}), or lower "
                    "rollout.gpu_memory_utilization, and run the same command again"
                )

    def _check_engines(self, returned: Mapping[int, int]) -> None:
        self._returned = dict(returned)
        for engine, now in returned.items():
            first = self._first_returned.setdefault(engine, now)  # it may have been replaced before it ever slept
            if now < first - GROWTH_BYTES:
                raise ClusterError(
                    f"memory of shared GPUs: engine {engine} gave back {gib(first)} when it first slept, and "
                    f"{gib(now)} now, {gib(GROWTH_BYTES)} less is the most that may be: the policy would not find its "
                    "room. Run the same command again, which starts new engines, and report this"
                )
