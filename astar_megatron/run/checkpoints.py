"""Where a run's checkpoints lie, which is the newest, and how a run goes on from it.

<run_dir>/checkpoints/step_<n> after n steps, whole if it fits its manifest; `latest` names the newest. saving.py writes
them.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from astar_megatron import config
from astar_megatron.algorithm.objective import Objective
from astar_megatron.cluster.policy_group import PolicyGroup
from astar_megatron.config import CheckpointConfig
from astar_megatron.data import rollout_files
from astar_megatron.data.contract import Contract, ContractError
from astar_megatron.data.manifest import MANIFEST_FILE, problems, strangers
from astar_megatron.data.prioritised import PrioritisedPrompts
from astar_megatron.data.prompts import PromptStream
from astar_megatron.data.run_folder import STEPS
from astar_megatron.model.compute_type import ComputeType
from astar_megatron.run.saving import IN_FLIGHT_FILE, LATEST_FILE, Saves
from astar_megatron.types import Prompt, Rollout
from conversion.folders import PROGRESS_FILE, first_few

CHECKPOINTS_FOLDER = "checkpoints"  # of a run
_LONGEST_NAME = 100  # bytes of `latest` that are read
type _Prompts = PromptStream | PrioritisedPrompts
# What progress.json holds, beside the objective's, which may be large, and what the ranks read of it.
_PROGRESS = {"step": int, "prompts": dict, "in_flight": int, "dtype": str}
_PROGRESS |= {"contract": dict, "settings": dict, "earlier": list}
_AT_THE_START = {"optim.dither": " (master weights go on as the checkpoint has them)"}


class DamagedCheckpointError(ValueError):
    """A checkpoint that is not as it was written; the message names the file and a checkpoint that is whole."""


class Checkpoints:
    """The checkpoints of one run; `settings` are its configuration, one value a key path."""

    def __init__(self, run_dir: Path, cfg: CheckpointConfig, contract: Contract, settings: dict[str, Any]) -> None:
        self._folder = run_dir / CHECKPOINTS_FOLDER
        self._cfg, self._contract, self._settings = cfg, contract, settings
        self._read: tuple[Path | None, dict[str, Any]] = None, {}  # _PROGRESS of the last checkpoint asked for

    @property
    def latest(self) -> Path | None:
        """The newest checkpoint, or None. Raises DamagedCheckpointError where it is not there."""
        return latest(self._folder.parent)

    def verify(self) -> None:
        """Read all files of the newest checkpoint; DamagedCheckpointError where one is not as it was written."""
        folder = self.latest
        if folder is None:
            return
        if faults := problems(folder):
            raise _error(self._folder, f"{folder} is damaged: {first_few(faults)}", folder.name)
        if others := strangers(folder):
            raise DamagedCheckpointError(
                f"{folder} is whole, but holds files that are not in {MANIFEST_FILE}: {first_few(others)}; move them "
                "away and run the same command again"
            )

    def newest_in_words(self) -> str:
        """Return what the same command would go on from."""
        step = self.steps
        return f"after step {step}, from the newest checkpoint" if step else "at the beginning: there is no checkpoint"

    @property
    def steps(self) -> int:
        """The steps behind the newest checkpoint, 0 without one. Raises ContractError, ValueError as `restore` does."""
        return self._progress(self.latest)["step"] if self.latest else 0

    def check_prompts(self, prompts: _Prompts) -> None:
        """Raise ValueError where the newest checkpoint was trained on others; `prompts` are then where it left them."""
        if (folder := self.latest) is not None:
            try:
                prompts.restore(self._progress(folder)["prompts"])
            except (AttributeError, TypeError) as error:
                raise self._damaged(folder / PROGRESS_FILE, repr(error)) from error

    def restore(self, prompts: _Prompts, objective: Objective) -> int:
        """Set prompt order and objective to the newest checkpoint's; return the steps behind it, 0 without one.

        Raises ContractError or ValueError for a checkpoint of other settings that this run can't go on from.
        """
        folder = self.latest
        if folder is None:
            return 0
        progress = self._read_progress(folder)
        self.check_method()
        self.check_prompts(prompts)
        try:
            objective.restore(progress)
            return progress["step"]
        except (AttributeError, KeyError, TypeError) as error:
            raise self._damaged(folder / PROGRESS_FILE, repr(error)) from error

    def resume(self, policy: PolicyGroup, prompts: _Prompts, objective: Objective, say: Callable[[str], None]) -> int:
        """As `restore`, and the policy too; `say` hears what a user may not expect of it."""
        self.check_type(policy.dtype)
        step, folder = self.restore(prompts, objective), self.latest
        if folder is not None:
            policy.load(folder, step)
        if changed := self.changed_settings():
            say(f"continuing after step {step} with other settings than before: {'; '.join(changed)}")
        return step

    def in_flight(self, prompts: Iterable[Prompt]) -> list[Rollout]:
        """Return the rollouts of these prompts that the newest checkpoint holds. Raises ValueError for damaged ones."""
        folder = self.latest
        if folder is None or not self._progress(folder)["in_flight"]:
            return []
        try:
            return rollout_files.read(folder / IN_FLIGHT_FILE, {prompt.uid: prompt for prompt in prompts})
        except (OSError, ValueError) as error:
            raise self._damaged(folder / IN_FLIGHT_FILE, str(error)) from error

    def changed_settings(self) -> list[str]:
        """Return in words the keys whose values are not those of the run that wrote the newest checkpoint."""
        return [
            f"{key} {before} -> {self._settings[key]}{_AT_THE_START.get(key, '')}"
            for key, before in self._other_settings().items()
        ]

    def earlier_settings(self) -> list[dict[str, Any]]:
        """Return which values settings had until which step, where they have had others since; for progress.json."""
        folder = self.latest
        if folder is None:
            return []
        progress, changed = self._progress(folder), self._other_settings()
        last = [{"until": progress["step"], "settings": changed}] if changed else []
        return [*progress["earlier"], *last]

    def _other_settings(self) -> dict[str, Any]:
        """The values that settings had in the run that wrote the newest checkpoint, where they have others now."""
        folder = self.latest
        before = self._progress(folder)["settings"] if folder else {}
        return config.changes(before, self._settings)

    def check_type(self, dtype: ComputeType) -> None:
        """Raise ValueError where the newest checkpoint was trained in another type: its weights would be others.

        In float32 the policy is its master weights, which dither has moved away from those that were published.
        """
        folder = self.latest
        before = self._progress(folder)["dtype"] if folder else dtype
        if before != dtype:
            raise ValueError(
                f"model.dtype: this run computes in {dtype}, but {folder} was trained in {before}, and would go on "
                f"with another policy; set it to {before}, or begin a new run_dir from an export"
            )

    def check_method(self) -> None:
        """Raise ValueError where another method has trained: each keeps what it learns, and its reference, its way."""
        folder = self.latest
        before = self._progress(folder)["settings"] if folder else self._settings
        was, now = (settings.get("objective.name") for settings in (before, self._settings))
        if was != now:
            raise ValueError(
                f"objective.name: {now}, but {folder} was trained with {was}; set it to {was}, or choose a new run_dir"
            )
        if config.method_of(before).copies_reference != config.method_of(self._settings).copies_reference:
            others = config.changes(before, self._settings).items()
            keys = " and ".join(f"{key}={value}" for key, value in others if key.startswith(f"{now}."))
            raise ValueError(
                f"{folder} was trained with {keys}, and its reference is that of such a run; set that as it was, or "
                "choose a new run_dir"
            )

    def _progress(self, folder: Path) -> dict[str, Any]:
        """What a checkpoint has in progress.json beside the objective's: training keeps it in memory."""
        if folder != self._read[0]:
            self._read_progress(folder)
        return self._read[1]

    def _read_progress(self, folder: Path) -> dict[str, Any]:
        """All of it, which is large where a method keeps something of each prompt."""
        try:
            progress: dict[str, Any] = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
            lacking = [name for name in _PROGRESS if progress.get(name, ...) is ...]
            wrong = [name for name, kind in _PROGRESS.items() if type(progress.get(name)) is not kind]
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            wrong, lacking = [f"{type(error).__name__}: {error}"], []
        if lacking:
            raise ValueError(
                f"{folder / PROGRESS_FILE}: has no {', '.join(lacking)}: another version wrote the checkpoint, or "
                "somebody changed it; go on with that version, or begin a new run_dir from an export"
            )
        if wrong or progress["step"] < 0:
            raise self._damaged(folder / PROGRESS_FILE, ", ".join(wrong) or "step")
        if differences := self._contract.difference(progress["contract"], ("this run", "the checkpoint")):
            raise ContractError(
                f"{folder}: made under another contract; choose a new run_dir or restore the settings\n  "
                + "\n  ".join(differences)
            )
        self._read = folder, {name: progress[name] for name in _PROGRESS}
        return progress

    def _damaged(self, file: Path, reason: str) -> DamagedCheckpointError:
        return _error(self._folder, f"{file}: missing or damaged ({reason})", file.parent.name)

    def saves(self, policy: PolicyGroup, say: Callable[[str], None]) -> Saves:
        """Return what writes the checkpoints of the policy that is trained."""
        record = {"contract": self._contract.fields(), "settings": self._settings, "earlier": self.earlier_settings()}
        return Saves(self._folder, self._cfg, record, policy, say)


def newest(run_dir: Path) -> Path:
    """Return the newest checkpoint of a run. Raises ValueError without one, DamagedCheckpointError as `latest` does."""
    folder = latest(run_dir)
    if folder is None:
        raise ValueError(f"{run_dir}: there is no checkpoint; run `astar train` first")
    return folder


def latest(run_dir: Path) -> Path | None:
    """Return the checkpoint that `latest` names, or None. Raises DamagedCheckpointError where it is not there.

    Where there is no `latest` it is the last folder, each of which was whole before it got its name.
    """
    checkpoints = run_dir / CHECKPOINTS_FOLDER
    pointer = checkpoints / LATEST_FILE
    try:
        with pointer.open("rb") as file:
            name = file.read(_LONGEST_NAME).decode(errors="replace").strip()
    except FileNotFoundError:
        return max((path.parent for path in checkpoints.glob(f"{STEPS}/{PROGRESS_FILE}")), default=None)
    except OSError as error:
        raise ValueError(
            f"{pointer}: can't read which checkpoint is the newest: {error.strerror}; mend that, or choose "
            "a new run_dir to start over"
        ) from error
    folder = checkpoints / name
    if name == ".." or folder.parent != checkpoints:
        raise _error(checkpoints, f"{pointer} names {name!r}, which is no folder in {checkpoints}", name)
    if not (folder / PROGRESS_FILE).is_file():
        problem = f"which has no {PROGRESS_FILE}" if folder.is_dir() else "which is not there"
        raise _error(checkpoints, f"{pointer} names {name!r}, {problem}", name)
    return folder


def _error(checkpoints: Path, culprit: str, bad: str) -> DamagedCheckpointError:
    """Return the error for checkpoint `bad`, with the remedy: the newest before it that is whole."""
    pointer = checkpoints / LATEST_FILE
    others = sorted((path for path in checkpoints.glob(STEPS) if path.name != bad), reverse=True)
    others = [path for path in others if path.name < bad] or others
    whole = next((path.name for path in others if not problems(path)), None)
    if whole is None:
        remedy = "no other checkpoint there is whole: choose a new run_dir to start over"
    else:
        remedy = f"{whole} is whole: write its name into {pointer} and run the same command again"
    return DamagedCheckpointError(f"{culprit}; {remedy}")
