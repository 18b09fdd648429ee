"""Leases: one holder at a time, none of a dead one, whatever order things happen in."""

import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from astar_megatron.data.leases import Leases

NAMES = [f"{i:03x}" for i in range(20)]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_name_has_one_holder_until_it_is_given_back(tmp_path: Path) -> None:
    with Leases(tmp_path / "l") as first, Leases(tmp_path / "l") as second:
        assert first.claim(NAMES[:3]) == NAMES[:3]
        assert second.claim(NAMES[:5]) == NAMES[3:5]
        assert first.claim(NAMES[:5]) == []
        first.release(NAMES[1:2])
        assert second.claim(NAMES[:5]) == NAMES[1:2]
        first.release(NAMES[:1])
        assert first.claim(NAMES[:1]) == NAMES[:1]
    assert files(tmp_path / "l") == []


def test_a_process_whose_name_the_kernel_has_cut_inside_a_letter_holds_its_leases(
    tmp_path: Path, cut_name: None
) -> None:
    with Leases(tmp_path / "l") as first, Leases(tmp_path / "l") as second:
        assert first.claim(NAMES[:1]) == NAMES[:1] and second.claim(NAMES[:1]) == []


def _hold_and_wait(folder: Path, ready: Callable[[], None]) -> None:
    leases = Leases(folder, expiry_seconds=0.3)
    leases.__enter__()
    leases.claim(NAMES[:4])
    ready()
    time.sleep(60)


@pytest.fixture
def holder(tmp_path: Path) -> Callable[[], BaseProcess]:
    """Returns a function that starts a process which holds NAMES[:4]."""
    context = multiprocessing.get_context("spawn")

    def start() -> BaseProcess:
        ready = context.Event()
        process = context.Process(target=_hold_and_wait, args=(tmp_path / "l", ready.set), daemon=True)
        process.start()
        assert ready.wait(60)
        return process

    return start


def test_the_leases_of_a_killed_process_are_free_at_once(tmp_path: Path, holder: Callable[[], BaseProcess]) -> None:
    process = holder()
    with Leases(tmp_path / "l", expiry_seconds=3600) as leases:
        assert leases.claim(NAMES[:6]) == NAMES[4:6]
        process.kill()
        process.join()
        assert leases.claim(NAMES[:6]) == NAMES[:4]
        assert [name for name in files(tmp_path / "l") if name.startswith("000.")] == ["000.2"]
    assert len(files(tmp_path / "l")) == 1  # what a killed process leaves of itself
    with Leases(tmp_path / "l"):
        pass
    assert files(tmp_path / "l") == []


def test_a_living_process_of_another_machine_keeps_its_leases_and_a_silent_one_does_not(
    tmp_path: Path, holder: Callable[[], BaseProcess]
) -> None:
    process = holder()
    with Leases(tmp_path / "l", expiry_seconds=1.0) as leases:
        (beat,) = (path for path in (tmp_path / "l").glob("*.beat") if leases.owner not in path.name)
        assert json.loads(beat.read_text())["pid"] == str(process.pid)
        until = time.monotonic() + 2.5
        while time.monotonic() < until:  # it beats six times an expiry
            assert leases.claim(NAMES[:4]) == []
            time.sleep(0.1)
        process.kill()
        process.join()
        foreign = json.loads(beat.read_text()) | {"machine": "elsewhere"}
        beat.write_text(json.dumps(foreign))  # in place: its leases are this file
        assert leases.claim(NAMES[:4]) == []  # its process can't be asked for: only time tells
        time.sleep(1.2)
        assert leases.claim(NAMES[:4]) == NAMES[:4]


def test_a_lease_that_nobody_can_read_expires_too(tmp_path: Path) -> None:
    with Leases(tmp_path, expiry_seconds=0.2) as leases:
        (tmp_path / "000.7").write_text("{half")
        assert leases.claim(NAMES[:1]) == []
        time.sleep(0.3)
        assert leases.claim(NAMES[:1]) == NAMES[:1]
        assert (tmp_path / "000.8").exists() and not (tmp_path / "000.7").exists()


def test_who_acts_on_an_old_view_steps_back(tmp_path: Path) -> None:
    """A late job saw a dead lease of generation 4; meanwhile that was succeeded, given back and taken from 1 on."""
    with Leases(tmp_path) as quick, Leases(tmp_path) as late:
        view = {"000": {4: tmp_path / "000.4"}}
        assert quick.claim(["000"]) == ["000"]
        views = iter([view])
        look = late._leases
        late._leases = lambda: next(views, None) or look()  # type: ignore[method-assign]
        assert late.claim(["000"]) == []
        assert (tmp_path / "000.1").exists() and not (tmp_path / "000.5").exists()


def test_a_job_that_wakes_gives_back_nothing_of_another(tmp_path: Path) -> None:
    with Leases(tmp_path, expiry_seconds=0.3) as woken, Leases(tmp_path, expiry_seconds=0.3) as second:
        assert woken.claim(["000"]) == ["000"]
        woken._end.set()  # as if it were stopped: it does not beat
        woken._thread.join()
        until = time.monotonic() + 30
        while not second.claim(["000"]) and time.monotonic() < until:
            time.sleep(0.1)
        second.release(["000"])
        with Leases(tmp_path) as third, Leases(tmp_path) as fourth:
            assert third.claim(["000"]) == ["000"] and (tmp_path / "000.1").samefile(woken._held["000"])
            woken.release(["000"])
            assert (tmp_path / "000.1").exists() and fourth.claim(["000"]) == []


def test_who_acts_on_an_old_view_takes_no_lease_whose_name_came_again(tmp_path: Path) -> None:
    """A late job saw a dead lease of generation 1; meanwhile that was succeeded, given back and taken from 1 on."""
    with Leases(tmp_path) as quick, Leases(tmp_path) as late:
        assert quick.claim(["000"]) == ["000"]
        expired, answers = late._expired, iter([True])
        late._expired = lambda path: next(answers, None) or expired(path)  # type: ignore[method-assign]
        assert late.claim(["000"]) == []
        assert files(tmp_path)[0] == "000.1" and not (tmp_path / "000.2").exists()


def _compete(folder: Path, seed: int, log: Path) -> None:
    chance = random.Random(seed)
    with Leases(folder, expiry_seconds=30) as leases, log.open("a") as file:
        for _ in range(60):
            for name in leases.claim(chance.sample(NAMES[:5], 2)):
                holding = folder.parent / f"{name}.holding"
                descriptor = os.open(holding, os.O_CREAT | os.O_EXCL)  # fails if somebody else is in here
                os.close(descriptor)
                file.write(name + "\n")
                holding.unlink()
                leases.release([name])


def test_processes_that_race_never_hold_one_name_together(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    racers = [context.Process(target=_compete, args=(tmp_path / "l", s, tmp_path / f"{s}.log")) for s in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(120)
    assert [racer.exitcode for racer in racers] == [0, 0, 0, 0]
    assert all(len((tmp_path / f"{s}.log").read_text().split()) > 20 for s in range(4))
