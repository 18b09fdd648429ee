"""WeightSync: the one place where weights move from the policy to the engines.

Planned once from the two layouts; each publish packs the policy's tiles into shared memory and makes every engine
take them over, in vLLM's order pause, update, finish(version), resume, with the prefix cache dropped.
Leaves out: several machines. Policy and engines must see one /dev/shm.
"""

import contextlib
import dataclasses
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from astar_megatron.cluster.policy_group import PolicyGroup
from astar_megatron.data.files import exclusive
from astar_megatron.rollout.pool import EnginePool
from conversion.families import Model

_SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "astar-"
_LOCK = "lock"  # held while the run lives: pids mean nothing to a container that shares this memory


class TransferFolder:
    """A folder in shared memory that lives as long as the run. A context manager."""

    def __init__(self) -> None:
        remove_left_behind()
        self.path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=_SHARED_MEMORY))
        self._lock = exclusive(self.path / _LOCK, "this run")

    def __enter__(self) -> Self:
        self._lock.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.__exit__(None, None, None)


def remove_left_behind() -> None:
    """Remove the folders of runs that were killed before they could; a living run holds the lock in its folder."""
    for folder in _SHARED_MEMORY.glob(f"{_PREFIX}*-*"):
        with contextlib.suppress(OSError):  # held, of another user, or just removed
            if (folder / _LOCK).stat().st_uid == os.getuid():
                with exclusive(folder / _LOCK, "another run"):
                    shutil.rmtree(folder, ignore_errors=True)


class WeightSync:
    """Carries the policy's weights to every engine of a pool through files in `folder`."""

    def __init__(self, policy: PolicyGroup, engines: EnginePool, model: Model, folder: Path) -> None:
        self._policy, self._engines = policy, engines
        policy.open_publish(engines.tensor, str(folder))
        engines.open_update(
            {
                "config": model.config,
                "layout": dataclasses.asdict(policy.layout),
                "folder": str(folder),
                "dtype": policy.dtype,
            }
        )

    def publish(self, version: int) -> None:
        """Give every engine the policy's current weights; rollouts drawn from now on carry `version`."""
        self._policy.publish()
        self._engines.update(version)
