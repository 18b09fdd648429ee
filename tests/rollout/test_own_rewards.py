"""A reward of the user's beside files of any name: it is loaded from the current folder, and they hide no other module.

Each neighbour raises when it is imported, so that whoever imports it in another's place fails.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import samples
import yaml

from astar_megatron.algorithm import rewards
from astar_megatron.cluster import processes
from astar_megatron.config import RewardConfig
from astar_megatron.rollout.scoring import Scorer
from astar_megatron.run.commands import start
from astar_megatron.types import Prompt

NEIGHBOURS = ("conversion", "types", "numbers", "json", "statistics", "torch", "astar_megatron")
JUDGE = """
import numbers, statistics, types
import conversion.tiles, astar_megatron.config
import helper

def reward(response, answer):
    assert isinstance(helper.VALUE, numbers.Real)
    return statistics.mean([helper.VALUE, helper.VALUE])
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a reward, what it imports, and neighbours."""
    here = tmp_path / "here"
    here.mkdir()
    (here / "my_module.py").write_text(JUDGE)
    (here / "helper.py").write_text("VALUE = 0.25")
    for name in NEIGHBOURS:
        (here / f"{name}.py").write_text(f"raise AssertionError('{name}.py of the current folder was imported')")
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", list(sys.path))  # loading a reward here adds the folder
    return here


def scored(name: str) -> float | None:
    prompt = Prompt(uid="u1", token_ids=(1,), text="What is 3 + 4?", answer="7")
    rollout = samples.rollout(prompt, text="7", reward=None)
    with Scorer(RewardConfig(name=name), num_processes=1) as scorer:
        return scorer.score([rollout])[0].reward


@pytest.mark.parametrize("first", [False, True], ids=["astar", "python -m"])
def test_files_beside_an_own_reward_take_no_other_modules_place(
    first: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if first:
        monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    assert rewards.version("my_module:reward").startswith("my_module:reward/sha256:")
    assert scored("my_module:reward") == 0.25


@pytest.mark.parametrize("name", ["numbers", "statistics", "conversion", "astar_megatron"])
def test_an_own_reward_with_the_name_of_a_needed_module_is_refused(name: str, folder: Path) -> None:
    (folder / f"{name}.py").write_text(JUDGE)
    for refused in (rewards.version, rewards.get):
        with pytest.raises(
            ValueError, match=rf"{name}\.py has the name of a module that this program needs; rename it"
        ):
            refused(f"{name}:reward")


def test_a_reward_of_the_current_folder_comes_before_one_of_its_name_on_the_path(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed/judge.py").write_text("def reward(response, answer):\n    return 0.75\n")
    monkeypatch.syspath_prepend(str(tmp_path / "installed"))
    installed = rewards.version("judge:reward")
    assert scored("judge:reward") == 0.75
    (folder / "judge.py").write_text("def reward(response, answer):\n    return 0.5\n")
    assert scored("judge:reward") == 0.5
    assert rewards.version("judge:reward") != installed


def test_a_reward_in_a_folder_without_init_is_found(folder: Path) -> None:
    (folder / "mine").mkdir()
    (folder / "mine/judge.py").write_text("def reward(response, answer):\n    return 0.5\n")
    assert rewards.version("mine.judge:reward").startswith("mine.judge:reward/sha256:")
    assert scored("mine.judge:reward") == 0.5


@pytest.mark.parametrize("first", [False, True], ids=["astar", "python -m"])
def test_a_command_of_a_command_finds_an_own_reward_among_files_of_any_name(
    first: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `--supervise`, `astar compare` and `astar scale` start them."""
    if first:
        monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    samples.write_jsonl(folder / "x.jsonl", [{"question": "What is 3 + 4?", "answer": "7"}])
    words = ["data", "jsonl", "x.jsonl", "--out", "out.jsonl", "--reward", "my_module:reward"]
    with start(words, subprocess.PIPE) as process:
        output, _ = process.communicate(timeout=100)
    assert process.returncode == 0 and b"my_module:reward" in output, output.decode()


def test_a_command_of_a_command_is_of_the_same_copy_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that lies in the current folder, before an installed one; and one anywhere on the path."""
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    assert processes.module_path() == [str(Path.cwd()), *sys.path[1:]]
    monkeypatch.chdir(tmp_path)
    copied = {"__init__": "", "cli": "def main(): print('a copy')", "cluster/processes": "def die_with(*_): ..."}
    for name, text in copied.items():
        file = tmp_path / "copies/astar_megatron" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path / "copies"))
    with start([], subprocess.PIPE) as process:
        assert process.communicate(timeout=100)[0] == b"a copy\n"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_stage_1_runs_among_files_of_any_name(folder: Path, tied_llama: Path) -> None:
    """The whole program: driver, Ray's workers, vLLM's own processes (two workers), and the reward's."""
    samples.write_jsonl(folder / "prompts.jsonl", [{"question": "What is 3 + 4?", "answer": "7"}])
    tree = samples.run_tree(
        run_dir="run",
        model={"path": str(tied_llama), "dtype": "float32"},
        data={"path": "prompts.jsonl", "max_prompt_tokens": 100},
        reward={"name": "my_module:reward"},
        sampling={"max_response_tokens": 9},
        sweep={"num_samples": 2},
        rollout={"max_num_seqs": 16, "tensor": 2},
        cluster={"start_timeout_seconds": 900.0},
    )
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    # As the script `astar` does: the current folder is not on the Python path.
    command = [sys.executable, "-P", "-m", "astar_megatron.cli", "sweep", "--config", "run.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "0.250" in done.stdout
