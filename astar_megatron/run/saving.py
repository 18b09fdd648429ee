"""Writes a run's checkpoints while its training goes on, and says what was not saved.

The ranks copy their state and write it in threads of theirs to step_<n>.incomplete. When all have, the driver adds
progress, rollouts and manifest, renames the folder to step_<n>, points `latest` at it and removes old ones. Until then
nothing of what was saved before is touched.
"""

import itertools
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from astar_megatron.algorithm.objective import Objective
from astar_megatron.cluster.errors import ClusterError
from astar_megatron.cluster.policy_group import PolicyGroup
from astar_megatron.cluster.signals import TimeIsUp
from astar_megatron.config import CheckpointConfig
from astar_megatron.data import rollout_files
from astar_megatron.data.files import StorageError, make_folder, storage_error, sync, write_atomic
from astar_megatron.data.manifest import write_manifest
from astar_megatron.data.run_folder import STEPS, step_name, step_of
from astar_megatron.rollout.training import TrainingRollouts
from astar_megatron.types import Rollout, SaveState
from conversion.folders import PROGRESS_FILE

IN_FLIGHT_FILE = "in_flight.parquet"
LATEST_FILE = "latest"
_INCOMPLETE = ".incomplete"
_ANSWER_SECONDS = 30.0  # after an error: a rank that hangs in a collective does not answer


@dataclass(frozen=True, slots=True, kw_only=True)
class _Begun:
    """A checkpoint that the ranks are writing to `temporary`, and what the driver will lay beside."""

    name: str
    temporary: Path
    progress: bytes
    in_flight: Sequence[Rollout]


class Saves:
    """The checkpoints that a run writes to `folder`, one at a time. A context manager: leaving it waits for the last,
    but on TimeIsUp and Ctrl-C.

    `record` goes into each progress.json. Where one can't be written `say` is told and training goes on; leaving raises
    StorageError if that was the last.
    """

    def __init__(
        self,
        folder: Path,
        cfg: CheckpointConfig,
        record: dict[str, Any],
        policy: PolicyGroup,
        say: Callable[[str], None],
    ) -> None:
        self._folder, self._cfg, self._record, self._policy, self._say = folder, cfg, record, policy, say
        self._begun: _Begun | None = None
        self._is_given_up = False  # waiting for it has ended in an error
        self._failure: StorageError | None = None  # of the last one
        self._waits: list[tuple[float, float]] = []
        self._left: set[Path] = set()  # what can't be removed, and is said to be

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is None:
            return self.finish()
        if isinstance(error, TimeIsUp | KeyboardInterrupt):
            return None
        try:
            self.poll(_ANSWER_SECONDS)
            if self._begun and self._is_given_up:
                self._say(f"{self._begun.name} was not saved")
            elif self._begun:
                self._say(f"{self._begun.name} is being written: waits for it")
                self.wait()
        except ClusterError as silence:  # the error that brought us here is the one to see
            name = self._begun.name if self._begun else "the last checkpoint"
            self._say(f"{name} was not saved: {str(silence).splitlines()[-1]}")

    def begin(self, step: int, batches: TrainingRollouts, objective: Objective) -> None:
        """Begin to write a checkpoint after `step` steps, of everything as it is now; waits for the one before.

        Training goes on with `batches`; what engines have drawn ahead is kept too.
        """
        self.wait()
        start, name = time.perf_counter(), step_name(step)
        temporary, in_flight = self._folder / (name + _INCOMPLETE), batches.in_flight()
        progress = {"step": step, "prompts": batches.state(), "in_flight": len(in_flight)}
        try:
            self._remove_leftovers()  # of a run that was killed
            if temporary.exists():  # nothing old may lie among what the ranks write
                raise StorageError(f"{temporary} can't be removed; remove it and run the same command again")
            make_folder(temporary)
            progress |= self._policy.begin_save(temporary)
        except OSError as error:
            self._fail(step, error)
        else:
            text = json.dumps(progress | objective.state() | self._record, indent=1) + "\n"
            self._begun = _Begun(name=name, temporary=temporary, progress=text.encode(), in_flight=in_flight)
        self._waits.append((start, time.perf_counter()))

    def poll(self, timeout_seconds: float | None = None) -> None:
        """Complete the checkpoint under way if all ranks have written theirs. ClusterError where a rank is dead."""
        if self._begun is not None:
            start = time.perf_counter()
            self._complete_if_written(self._begun, self._policy.save_states(timeout_seconds))
            self._waits.append((start, time.perf_counter()))

    def wait(self) -> None:
        """Wait until nothing is under way. ClusterError where a rank is dead, or writes for longer than it may."""
        if self._begun is not None:
            start = time.perf_counter()
            try:
                states = self._policy.save_states(wait=True)
            except ClusterError:
                self._is_given_up = True
                raise
            self._complete_if_written(self._begun, states)
            self._waits.append((start, time.perf_counter()))

    def _complete_if_written(self, begun: _Begun, states: Sequence[SaveState]) -> None:
        if not all(state.done for state in states):
            return
        self._begun = None
        try:
            for state in states:
                if state.problem:
                    raise StorageError(state.problem)
            self._complete(begun)
            self._failure = None
        except OSError as error:
            self._fail(step_of(begun.name), error)

    def finish(self) -> None:
        """Wait for the checkpoint under way. Raises StorageError where the last one could not be written."""
        self.wait()
        if self._failure:
            raise self._failure

    def take_waits(self) -> list[tuple[float, float]]:
        """Return from when to when training waited for checkpoints since the last call, by time.perf_counter()."""
        waits, self._waits = self._waits, []
        return waits

    def _complete(self, begun: _Begun) -> None:
        """Make of what the ranks have written a checkpoint that `latest` names; then remove what is too old."""
        digests, temporary, folder = self._policy.finish_save(), begun.temporary, self._folder / begun.name
        write_atomic(temporary / PROGRESS_FILE, begun.progress)
        if begun.in_flight:
            rollout_files.write(temporary / IN_FLIGHT_FILE, begun.in_flight)
        for path in [path for path in temporary.rglob("*") if path.name not in digests]:
            sync(path)
        write_manifest(temporary, digests)
        if folder.exists():  # of a run that was set back by hand
            names = (f"{begun.name}.earlier-{number}{_INCOMPLETE}" for number in itertools.count(1))
            folder.rename(next(aside for name in names if not (aside := folder.with_name(name)).exists()))
        temporary.rename(folder)
        sync(self._folder)
        write_atomic(self._folder / LATEST_FILE, begun.name.encode())
        self._remove_before(begun.name)

    def _remove_before(self, name: str) -> None:
        """Remove the checkpoints before `name` that are not kept.

        Later ones are of a run that was set back by hand: they are its user's to keep or to remove.
        """
        earlier = sorted(path for path in self._folder.glob(STEPS) if path.name < name)
        for old in earlier[: max(0, len(earlier) + 1 - self._cfg.keep)]:
            if self._cfg.keep_every is None or step_of(old.name) % self._cfg.keep_every:
                try:
                    old.rename(old.with_name(old.name + _INCOMPLETE))  # half a folder is no checkpoint
                except OSError as error:
                    self._leave(old, f"{old}: {error.strerror}")
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        """Remove what is no checkpoint, but for what can't be: there someone reads a file, or has mounted something."""
        for rest in sorted((*self._folder.glob("*" + _INCOMPLETE), *self._folder.glob(f".{LATEST_FILE}.*.tmp"))):
            reasons = _remove(rest)
            if reasons and rest.exists():
                self._leave(rest, reasons[0])

    def _leave(self, path: Path, reason: str) -> None:
        """Say, once, that something stays."""
        if path not in self._left:
            self._left.add(path)
            self._say(f"{path} can't be removed ({reason}); the run does not need it: remove it when you can")

    def _fail(self, step: int, error: OSError) -> None:
        """Say that the checkpoint after `step` steps is not there, and make room again."""
        self._remove_leftovers()
        if not isinstance(error, StorageError):
            error = storage_error(f"{self._folder}: can't be written", error)
        self._failure = StorageError(f"the checkpoint after {step} steps was not saved: {error}")
        self._say(
            f"{str(self._failure).partition('; ')[0]}. Nothing that was saved is changed. If steps are left training "
            f"goes on, and tries again {self._cfg.interval} steps later: mend that by then (make room, or the folder "
            "writable)"
        )


def _remove(path: Path) -> list[str]:
    """Remove a file, or of a folder all that can be; returns why the rest stays, where it has."""
    reasons = list[str]()

    def note(_call: object, name: str, error: BaseException) -> None:
        reasons.append(f"{name}: {getattr(error, 'strerror', None) or error}")

    if path.is_dir():
        shutil.rmtree(path, onexc=note)
        return reasons
    try:
        path.unlink()
    except OSError as error:
        note(path.unlink, str(path), error)
    return reasons
