"""What is said of a run that has a checkpoint, before anything starts and when it is interrupted."""

import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from broken_house import ROWS, House, checkpoint, prompts

from astar_megatron import config, doctor
from astar_megatron import train as program
from astar_megatron.cluster.errors import ActorLost
from astar_megatron.run.fleet import Fleet
from astar_megatron.run.prepare import prepare
from astar_megatron.run.tracking import Tracker


@pytest.fixture
def house(tmp_path: Path, tied_llama: Path) -> House:
    """A run with 7 steps behind its checkpoint."""
    house = House.build(tmp_path, tied_llama)
    checkpoint()(house)
    return house


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("train.num_steps=9",), "this run can go on after step 7, 2 to go, with other settings than before ("),
        (("train.num_steps=7",), "this run can only export again, all 7 steps are behind it"),
        (("optim.lr=3e-7",), "optim.lr 1e-06 -> 3e-07"),
    ],
)
def test_a_look_at_a_run_says_where_it_goes_on_and_what_has_changed(
    settings: tuple[str, ...], words: str, house: House, astar: Any
) -> None:
    overrides = [word for setting in settings for word in ("--set", setting)]
    status, out, _ = astar("train", "--config", house / "run.yaml", "--dry-run", *overrides)
    assert status == 0 and words in out


def test_prompts_that_were_added_are_refused_before_they_are_drawn(
    house: House, astar: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "main", lambda: 0)
    prompts(*ROWS, {"question": "What is 2 + 2?", "answer": "4"})(house)
    for name in ("train --dry-run", "doctor", "sweep"):
        status, _, error = astar(*name.split(), "--config", house / "run.yaml")
        assert status == 2 and "data.path: its prompts are not those that the checkpoint was trained on" in error


def test_a_sweep_names_the_other_method_of_a_checkpoint(house: House, astar: Any) -> None:
    status, _, error = astar("sweep", "--config", house / "run.yaml", "--set", "objective.name=grpo")
    assert status == 2 and "was trained with astar; set it to astar" in error


def test_the_export_of_a_run_that_went_on_says_which_settings_were_others(
    house: House, tied_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(folder: Path) -> None:
        shutil.copytree(tied_llama, folder)
        (folder / "conversion.json").write_text("{}")

    monkeypatch.setattr(program, "certify", lambda *_: "agrees")
    cfg = config.load(house / "run.yaml", ["optim.lr=3e-7", "train.num_steps=7"])
    inputs, tracker = prepare(cfg), Tracker(cfg.run_dir)
    policy = SimpleNamespace(logprobs=None, dtype="float32")
    engines = SimpleNamespace(drop_requests=lambda: None)
    fleet = SimpleNamespace(generating=lambda *_: nullcontext(), export=export, policy=policy, engines=engines)
    spending = SimpleNamespace(done=7, reached=[], has_reached_a_part=False)
    dashboards = SimpleNamespace(show_final=lambda *_: None)
    record = SimpleNamespace(spending=spending, tracker=tracker, dashboards=dashboards)
    program._finish(cfg, inputs, cast(Any, fleet), cast(Any, record))
    text = (cfg.export_dir / "README.md").read_text()
    assert text.index("| `optim.lr` | `3e-07` |") < text.index("Until step 7 others:") < text.index("`1e-06`")


def test_an_interrupted_training_says_what_the_same_command_goes_on_from(
    house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "train", interrupted)
    cfg = config.load(house / "run.yaml")
    inputs = prepare(cfg)
    with pytest.raises(KeyboardInterrupt):
        program.train_whatever_dies(cfg, inputs, None, cast(Any, SimpleNamespace()), Tracker(cfg.run_dir))
    assert "interrupted; the same command goes on after step 7, from the newest checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["load", "restart"])
@pytest.mark.parametrize("num_deaths", [1, 2, 3])
def test_a_rank_that_dies_while_ranks_start_anew_counts_as_one_that_dies_a_moment_later(
    place: str, num_deaths: int, house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, restarts, deaths = config.load(house / "run.yaml"), list[int](), ["load", *[place] * num_deaths]
    inputs, tracker = prepare(cfg), Tracker(cfg.run_dir)

    def pass_by(where: str) -> None:
        if deaths[:1] == [where]:
            deaths.pop(0)
            raise ActorLost("policy rank 3: was killed", kind="policy rank", index=3)

    def restart() -> None:
        restarts.append(1)
        pass_by("restart")

    monkeypatch.setattr(program, "train", lambda *_: pass_by("load"))
    fleet = Fleet(cfg, inputs.model, tracker)
    fleet.policy = cast(Any, SimpleNamespace(restart=restart))
    fleet.engines = cast(Any, SimpleNamespace(drop_requests=lambda: None, go_on=lambda: None))
    with pytest.raises(ActorLost) if num_deaths == 3 else nullcontext():
        program.train_whatever_dies(cfg, inputs, None, fleet, tracker)
    assert not deaths and len(restarts) == min(3, num_deaths + 1)
