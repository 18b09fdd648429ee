"""The identity of a reward: stable, different where the source is, and found without running a stranger's module."""

import sys
from importlib import metadata
from pathlib import Path

import pytest

from astar_megatron.algorithm import rewards


def test_the_version_is_stable_and_follows_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raised = (
        "boxed_integer/7",
        "countdown/2",
        "gsm8k_flexible/4",
        "gsm8k_strict/2",
        "last_number/6",
        "math/5",
    )  # with what they score
    assert tuple(rewards.version(name.partition("/")[0]) for name in raised) == raised
    imported = rewards.version("astar_megatron.algorithm.rewards.latex:math")
    assert imported.startswith("astar_megatron.algorithm.rewards.latex:math/sha256:")
    assert imported != rewards.version("astar_megatron.algorithm.rewards.latex:normalised")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text("def reward(response, answer):\n    return 0\n")
    before = rewards.version("my_rewards:reward")
    assert before == rewards.version("my_rewards:reward")
    (tmp_path / "my_rewards.py").write_text("def reward(response, answer):\n    return 1\n")
    assert before != rewards.version("my_rewards:reward")


def test_the_version_of_math_verify_is_ours_and_the_librarys() -> None:
    pytest.importorskip("math_verify", reason="needs the package math-verify")
    assert rewards.version("math_verify") == f"math_verify/8+{metadata.version('math-verify')}"


@pytest.mark.parametrize("module", ["mine_alone", "mine_packed", "mine_packed.inner.rule"])
def test_the_version_of_a_strangers_reward_imports_nothing_of_it(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in (
        "mine_alone.py",
        "mine_packed/__init__.py",
        "mine_packed/inner/__init__.py",
        "mine_packed/inner/rule.py",
    ):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("raise AssertionError('it was imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert rewards.version(f"{module}:reward").startswith(f"{module}:reward/sha256:")
    assert not any(name.startswith("mine_") for name in sys.modules)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("math:fsum", "no Python source"),
        ("sys:exit", "no Python source"),
        ("no_such_package.x:f", "no such module"),
        ("json.no_such_module:f", "no such module"),
        ("json.decoder.deeper:f", "no such module"),
        (":f", "no such module"),
        ("gsm8k_strikt", "nearest is gsm8k_strict"),
    ],
)
def test_what_has_no_source_has_no_version(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rewards.version(name)
