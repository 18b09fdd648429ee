"""Where a run's checkpoints lie, which is the newest, and how a run goes on from it.

<run_dir>/checkpoints/step_<n> after n steps, whole by its name (model/checkpoint.py); `latest` names the newest.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from astar_megatron.algorithm.objective import Objective
from astar_megatron.cluster.policy_group import PolicyGroup
from astar_megatron.config import CheckpointConfig
from astar_megatron.data import rollout_files
from astar_megatron.data.contract import Contract, ContractError
from astar_megatron.data.files import write_atomic
from astar_megatron.data.prioritised import PrioritisedPrompts
from astar_megatron.data.prompts import PromptStream
from astar_megatron.rollout.training import TrainingRollouts
from astar_megatron.types import Prompt, Rollout

_PROGRESS_FILE = "progress.json"  # model/checkpoint.py writes it
_IN_FLIGHT_FILE = "in_flight.parquet"
type _Prompts = PromptStream | PrioritisedPrompts
_BEFORE_DITHER = {"optim.dither": False}  # of checkpoints that are older than the key
_AT_THE_START = {"optim.dither": " (master weights go on as the checkpoint has them)"}


class Checkpoints:
    """The checkpoints of one run; `settings` are its configuration, one value a key path."""

    def __init__(self, run_dir: Path, cfg: CheckpointConfig, contract: Contract, settings: dict[str, Any]) -> None:
        self._folder = run_dir / "checkpoints"
        self._keep, self._contract, self._settings = cfg.keep, contract, settings

    @property
    def latest(self) -> Path | None:
        """The newest whole checkpoint, or None."""
        pointer = self._folder / "latest"
        if not pointer.exists():
            return None
        name = pointer.read_text(encoding="utf-8").strip()
        folder = self._folder / name
        if not name or not (folder / _PROGRESS_FILE).is_file():
            raise ValueError(
                f"{pointer} names {name!r}, which is missing or damaged; write the name of a whole step_* folder "
                f"into it, or remove {self._folder} to start over"
            )
        return folder

    def restore(self, prompts: _Prompts, objective: Objective) -> int:
        """Set prompt order and objective to the newest checkpoint's; return the steps behind it, 0 without one.

        Raises ContractError or ValueError for a checkpoint of other settings that this run can't go on from.
        """
        folder = self.latest
        if folder is None:
            return 0
        progress = self._progress(folder)
        self.check_method()
        try:
            prompts.restore(progress["prompts"])
            objective.restore(progress)
            return int(progress["step"])
        except (AttributeError, KeyError, TypeError) as error:
            raise self._damaged(folder / _PROGRESS_FILE, repr(error)) from error

    def resume(self, policy: PolicyGroup, prompts: _Prompts, objective: Objective) -> int:
        """As `restore`, and the policy too."""
        step, folder = self.restore(prompts, objective), self.latest
        if folder is not None:
            policy.load(folder, step)
        return step

    def in_flight(self, prompts: Iterable[Prompt]) -> list[Rollout]:
        """Return the rollouts of these prompts that the newest checkpoint holds. Raises ValueError for damaged ones."""
        folder = self.latest
        if folder is None or not self._progress(folder).get("in_flight"):
            return []
        try:
            return rollout_files.read(folder / _IN_FLIGHT_FILE, {prompt.uid: prompt for prompt in prompts})
        except (OSError, ValueError) as error:
            raise self._damaged(folder / _IN_FLIGHT_FILE, str(error)) from error

    def changed_settings(self) -> list[str]:
        """Return in words the keys whose values are not those of the run that wrote the newest checkpoint."""
        folder = self.latest
        before = _BEFORE_DITHER | self._progress(folder).get("settings", {}) if folder else {}
        return [
            f"{key} {before[key]} -> {new}{_AT_THE_START.get(key, '')}"
            for key, new in self._settings.items()
            if before.get(key, new) != new
        ]

    def check_method(self) -> None:
        """Raise ValueError where another method has trained: each keeps what it learns, and its reference, its way."""
        folder = self.latest
        before = self._progress(folder).get("settings", {}) if folder else self._settings
        was, now = ((_method(settings), _copies(settings)) for settings in (before, self._settings))
        if was[0] != now[0]:
            raise ValueError(
                f"objective.name: {now[0]}, but {folder} was trained with {was[0]}; set it to {was[0]}, or choose a "
                "new run_dir"
            )
        if was[1] != now[1]:
            raise ValueError(
                f"oapl.refresh_steps: {folder} was trained with {before.get('oapl.refresh_steps')}, and its reference "
                "is that of such a run; set it as it was, or choose a new run_dir"
            )

    def _progress(self, folder: Path) -> dict[str, Any]:
        try:
            progress: dict[str, Any] = json.loads((folder / _PROGRESS_FILE).read_text(encoding="utf-8"))
            missing = {"step", "prompts", "contract"} - progress.keys()
        except (OSError, ValueError, AttributeError) as error:
            missing = {f"{type(error).__name__}: {error}"}
        if missing:
            raise self._damaged(folder / _PROGRESS_FILE, ", ".join(sorted(missing)))
        if differences := self._contract.difference(progress["contract"], ("this run", "the checkpoint")):
            raise ContractError(
                f"{folder}: made under another contract; choose a new run_dir or restore the settings\n  "
                + "\n  ".join(differences)
            )
        return progress

    def _damaged(self, file: Path, reason: str) -> ValueError:
        return ValueError(
            f"{file}: missing or damaged ({reason}); write the name of another step_* folder into "
            f"{self._folder / 'latest'}, or remove {self._folder} to start over"
        )

    def save(self, policy: PolicyGroup, step: int, batches: TrainingRollouts, objective: Objective) -> None:
        """Write a checkpoint after `step` steps, point `latest` at it, remove all but the newest few.

        Training goes on with `batches`; what engines have drawn ahead is kept too.
        """
        folder = self._folder / f"step_{step:08d}"
        if folder.exists():  # of a run that was set back by hand
            shutil.rmtree(folder)
        progress = {"step": step, "prompts": batches.state(), "contract": self._contract.fields()}
        in_flight = batches.in_flight()
        own = {"in_flight": len(in_flight), "settings": self._settings}
        policy.save(folder, progress | objective.state() | own)
        if in_flight:  # beside what the ranks wrote, before `latest` names the folder
            rollout_files.write(folder / _IN_FLIGHT_FILE, in_flight)
        write_atomic(self._folder / "latest", folder.name.encode())
        # Later ones are of a run that was set back by hand: they are its user's to keep or to remove.
        earlier = sorted(path for path in self._folder.glob("step_????????") if path.name < folder.name)
        for old in earlier[: max(0, len(earlier) + 1 - self._keep)]:
            shutil.rmtree(old, ignore_errors=True)


def _method(settings: dict[str, Any]) -> str:
    return settings.get("objective.name", "astar")  # the only one before there were several


def _copies(settings: dict[str, Any]) -> bool:
    return _method(settings) == "oapl" and settings.get("oapl.refresh_steps") is not None
