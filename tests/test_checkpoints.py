"""Which checkpoints of a run are kept (the policy's part is a fake that makes the folder)."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import samples
from samples import CONTRACT

from astar_megatron.algorithm.astar import Astar
from astar_megatron.algorithm.refresh import LiveVStar
from astar_megatron.cluster.policy_group import PolicyGroup
from astar_megatron.config import AstarConfig, CheckpointConfig
from astar_megatron.data.contract import Contract, ContractError
from astar_megatron.data.prompts import PromptStream
from astar_megatron.rollout.training import TrainingRollouts
from astar_megatron.run.checkpoints import Checkpoints
from astar_megatron.types import Prompt, Rollout

FIXED = Astar(AstarConfig(), LiveVStar({}, {}, 0.5, None))
PROMPTS = [Prompt(uid=str(i), token_ids=(i,), text="", answer="") for i in range(3)]


class FakePolicy:
    """Writes what the driver reads of a checkpoint."""

    def save(self, folder: Path, progress: dict[str, Any]) -> None:
        folder.mkdir(parents=True)
        (folder / "progress.json").write_text(json.dumps(progress))


def checkpoints_of(
    run_dir: Path, contract: Contract = CONTRACT, settings: dict[str, Any] | None = None, keep: int = 2
) -> Checkpoints:
    return Checkpoints(run_dir, CheckpointConfig(keep=keep), contract, settings or {})


def stream() -> PromptStream:
    return PromptStream(PROMPTS, 2, 0)


class FakeBatches:
    """Where training goes on, and what has been drawn ahead of it."""

    def __init__(self, drawn: Sequence[Rollout]) -> None:
        self._drawn = drawn

    def state(self) -> dict[str, Any]:
        return stream().state()

    def in_flight(self) -> Sequence[Rollout]:
        return self._drawn


def save(checkpoints: Checkpoints, step: int, objective: Astar = FIXED, drawn: Sequence[Rollout] = ()) -> None:
    batches = cast(TrainingRollouts, FakeBatches(drawn))
    checkpoints.save(cast(PolicyGroup, FakePolicy()), step, batches, objective)


def astar(live: LiveVStar) -> Astar:
    return Astar(AstarConfig(), live)


def kept(run_dir: Path, keep: int, steps: Iterable[int]) -> list[int]:
    """The steps whose checkpoints are there once those of `steps` were saved."""
    checkpoints = checkpoints_of(run_dir, keep=keep)
    for step in steps:
        save(checkpoints, step)
    return sorted(int(path.name.removeprefix("step_")) for path in (run_dir / "checkpoints").glob("step_*"))


@pytest.mark.parametrize("keep", [1, 2, 3, 4, 5, 6, 9])
def test_the_newest_are_kept(keep: int, tmp_path: Path) -> None:
    assert kept(tmp_path, keep, range(1, 9)) == list(range(1, 9))[-keep:]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000008"


def test_later_ones_of_a_run_that_was_set_back_neither_count_nor_vanish(tmp_path: Path) -> None:
    assert kept(tmp_path, 2, [10, 20]) == [10, 20]
    assert kept(tmp_path, 2, [5, 6, 7]) == [6, 7, 10, 20]


def test_what_was_drawn_ahead_is_in_the_checkpoint_and_its_loss_is_named(tmp_path: Path) -> None:
    drawn = [samples.rollout(prompt, seed=seed) for seed, prompt in enumerate(PROMPTS)]
    save(checkpoints_of(tmp_path), 1)
    assert checkpoints_of(tmp_path).in_flight(PROMPTS) == []
    save(checkpoints_of(tmp_path), 2, drawn=drawn)
    assert checkpoints_of(tmp_path).in_flight(PROMPTS) == drawn
    (tmp_path / "checkpoints" / "step_00000002" / "in_flight.parquet").unlink()
    with pytest.raises(ValueError, match=r"step_00000002/in_flight\.parquet: missing or damaged .*latest"):
        checkpoints_of(tmp_path).in_flight(PROMPTS)


@pytest.mark.parametrize(
    "damage",
    [{"prompts": None}, {"prompts": []}, {"v_star": {"beta1": 0.5, "decay": 0.9}}, {"v_star": 7}, {"step": None}],
)
def test_progress_that_is_damaged_inside_is_said_to_be(damage: dict[str, Any], tmp_path: Path) -> None:
    checkpoints, live = checkpoints_of(tmp_path), LiveVStar({}, {}, 0.5, 0.9)
    save(checkpoints, 3, astar(live))
    path = tmp_path / "checkpoints" / "step_00000003" / "progress.json"
    if "beta1" in str(damage):
        damage = {"v_star": damage["v_star"] | {"stage_1": live._digest()}}
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(ValueError, match=r"progress\.json: missing or damaged"):
        checkpoints.restore(stream(), astar(live))


def test_a_run_whose_rewards_read_no_special_tokens_is_not_continued_with_those_that_do(tmp_path: Path) -> None:
    save(checkpoints_of(tmp_path), 3)
    now = dataclasses.replace(CONTRACT, kept_token_ids=(5,))
    words = r"kept token ids: this run has \[5\], the checkpoint none: its rewards read"
    with pytest.raises(ContractError, match=words):
        checkpoints_of(tmp_path, now).restore(stream(), FIXED)


def test_v_star_refreshed_under_another_beta1_is_refused_before_a_policy_starts(tmp_path: Path) -> None:
    def live(beta1: float) -> LiveVStar:
        return LiveVStar({"0": 0.5}, {"0": 4}, beta1, 0.9)

    checkpoints, before, after = checkpoints_of(tmp_path), live(0.5), live(0.5)
    before.add([("0", 1.0)])
    save(checkpoints, 3, astar(before))
    assert checkpoints.restore(stream(), astar(after)) == 3 and after["0"] == before["0"] != 0.5
    with pytest.raises(ValueError, match=r"astar\.beta1: the checkpoint's V\* was refreshed with astar\.beta1 0\.5"):
        checkpoints.restore(stream(), astar(live(0.25)))


def test_a_checkpoint_from_before_the_key_goes_on_without_dither_and_that_is_said(tmp_path: Path) -> None:
    def changed(written: dict[str, Any], settings: dict[str, Any]) -> list[str]:
        save(checkpoints_of(tmp_path, settings=written), 1)
        return checkpoints_of(tmp_path, settings=settings).changed_settings()

    as_saved = "(master weights go on as the checkpoint has them)"
    assert changed({"seed": 1}, {"seed": 1, "optim.dither": True}) == [f"optim.dither False -> True {as_saved}"]
    assert changed({"optim.dither": True}, {"optim.dither": False}) == [f"optim.dither True -> False {as_saved}"]
    assert changed({"seed": 1}, {"seed": 1, "optim.dither": False}) == []
    assert changed({"optim.dither": True, "seed": 1}, {"seed": 2, "optim.dither": True}) == ["seed 1 -> 2"]


def test_a_checkpoint_of_another_method_is_refused_and_one_without_a_name_is_astars(tmp_path: Path) -> None:
    save(checkpoints_of(tmp_path), 3)  # as before there were several
    assert checkpoints_of(tmp_path, settings={"objective.name": "astar"}).restore(stream(), FIXED) == 3
    with pytest.raises(ValueError, match=r"objective\.name: ppo, but .*step_00000003 was trained with astar; set it"):
        checkpoints_of(tmp_path, settings={"objective.name": "ppo"}).restore(stream(), FIXED)


def test_a_reference_that_is_a_copy_is_not_continued_as_one_that_is_not(tmp_path: Path) -> None:
    oapl: dict[str, Any] = {"objective.name": "oapl", "oapl.refresh_steps": 5}
    save(checkpoints_of(tmp_path, settings=oapl), 3)
    checkpoints_of(tmp_path, settings=oapl | {"oapl.refresh_steps": 7}).check_method()
    with pytest.raises(ValueError, match=r"oapl\.refresh_steps: .*step_00000003 was trained with 5"):
        checkpoints_of(tmp_path, settings=oapl | {"oapl.refresh_steps": None}).check_method()
