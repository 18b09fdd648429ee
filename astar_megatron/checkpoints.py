"""Where a run's checkpoints lie, which is the newest, and how a run goes on from it.

<run_dir>/checkpoints/step_<n> after n steps, whole by its name (model/checkpoint.py); `latest` names the newest.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from astar_megatron.cluster.policy_group import PolicyGroup
from astar_megatron.config import CheckpointConfig
from astar_megatron.data.contract import Contract, ContractError
from astar_megatron.data.files import write_atomic
from astar_megatron.data.prompts import PromptStream

_PROGRESS_FILE = "progress.json"  # model/checkpoint.py writes it


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, run_dir: Path, cfg: CheckpointConfig, contract: Contract) -> None:
        self._folder = run_dir / "checkpoints"
        self._keep, self._contract = cfg.keep, contract

    @property
    def latest(self) -> Path | None:
        """The newest whole checkpoint, or None."""
        pointer = self._folder / "latest"
        if not pointer.exists():
            return None
        folder = self._folder / pointer.read_text(encoding="utf-8").strip()
        if not (folder / _PROGRESS_FILE).is_file():
            raise ValueError(
                f"{pointer} names {folder.name}, which is missing or damaged; write the name of a whole step_* folder "
                f"into it, or remove {self._folder} to start over"
            )
        return folder

    @property
    def steps_done(self) -> int:
        """The steps behind the newest checkpoint, 0 without one. Raises ContractError for one of other settings."""
        folder = self.latest
        return 0 if folder is None else int(self._progress(folder)["step"])

    def resume(self, policy: PolicyGroup, prompts: PromptStream) -> int:
        """Restore policy and prompt order from the newest checkpoint and return the steps done, 0 without one."""
        folder = self.latest
        if folder is None:
            return 0
        progress = self._progress(folder)
        prompts.restore(progress["prompts"])
        policy.load(folder, progress["step"])
        return int(progress["step"])

    def _progress(self, folder: Path) -> dict[str, Any]:
        progress: dict[str, Any] = json.loads((folder / _PROGRESS_FILE).read_text(encoding="utf-8"))
        if differences := self._contract.difference(progress["contract"], ("this run", "the checkpoint")):
            raise ContractError(
                f"{folder}: made under another contract; choose a new run_dir or restore the settings\n  "
                + "\n  ".join(differences)
            )
        return progress

    def save(self, policy: PolicyGroup, step: int, prompts: PromptStream) -> None:
        """Write a checkpoint after `step` steps, point `latest` at it, remove all but the newest few."""
        folder = self._folder / f"step_{step:08d}"
        if folder.exists():  # of a run that was set back by hand
            shutil.rmtree(folder)
        policy.save(folder, {"step": step, "prompts": prompts.state(), "contract": self._contract.fields()})
        write_atomic(self._folder / "latest", folder.name.encode())
        others = sorted(path for path in self._folder.glob("step_????????") if path != folder)
        for old in others[: len(others) + 1 - self._keep]:
            shutil.rmtree(old, ignore_errors=True)
