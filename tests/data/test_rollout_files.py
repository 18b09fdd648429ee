"""Rollouts of steps on disk: read back as they were, the newest kept, a damaged file refused."""

import dataclasses
from array import array
from collections.abc import Sequence
from pathlib import Path

import pytest
import samples

from astar_megatron.data import rollout_files
from astar_megatron.data.rollout_files import RolloutFiles
from astar_megatron.types import Prompt, Rollout

PROMPT, OTHER = (Prompt(uid=uid, token_ids=(1, 2), text="1 + 1?", answer="2") for uid in ("a", "b"))
ACROSS = samples.rollout(
    PROMPT,
    seed=(1 << 63) - 1,
    token_ids=(5, 151_642, 2),
    text="2 é",
    truncated=True,
    token_logprobs=(-0.1, -1 / 3, -1e-12),
    first_version=3,
    last_version=5,
    tokens_by_version=(1, 0, 2),
)
STATS = dataclasses.replace(
    samples.STATS,
    token_logprobs=array("f", (-0.25,) * 3),
    reference_token_logprobs=array("f", (-0.5,) * 3),
)
ROLLOUTS = [ACROSS, samples.rollout(OTHER, reward=None), samples.rollout(PROMPT, token_ids=(), token_logprobs=())]


def test_rollouts_are_read_back_bit_for_bit(tmp_path: Path) -> None:
    rollout_files.write(tmp_path / "x.parquet", ROLLOUTS)
    assert rollout_files.read(tmp_path / "x.parquet", {"a": PROMPT, "b": OTHER}) == ROLLOUTS
    assert rollout_files.read(tmp_path / "x.parquet", {"b": OTHER}) == ROLLOUTS[1:2]


def test_no_rollouts_are_a_file_too(tmp_path: Path) -> None:
    rollout_files.write(tmp_path / "x.parquet", [])
    assert rollout_files.read(tmp_path / "x.parquet", {}) == []


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: data[:90] + b"?" + data[91:], lambda data: b""]
)
def test_a_damaged_file_is_named(damage: object, tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    rollout_files.write(path, ROLLOUTS)
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"x\.parquet: damaged"):
        rollout_files.read(path, {"a": PROMPT, "b": OTHER})


@pytest.mark.parametrize(("keep", "left"), [(None, [0, 1, 2, 3]), (0, []), (1, [3]), (3, [1, 2, 3])])
def test_the_newest_steps_are_kept(keep: int | None, left: list[int], tmp_path: Path) -> None:
    files = RolloutFiles(tmp_path, keep, decoded)
    files.begin(0)
    for step in range(4):
        files.write(step, [numbered(step)], STATS)
    assert numbers(tmp_path) == left


def test_a_resumed_run_writes_its_steps_again(tmp_path: Path) -> None:
    files = RolloutFiles(tmp_path, None, decoded)
    files.begin(0)
    for step in range(5):
        files.write(step, [numbered(step)], STATS)
    files.begin(2)
    assert numbers(tmp_path) == [0, 1]
    files.write(2, [numbered(7)], STATS)
    (again,) = rollout_files.read(tmp_path / "rollouts" / "step_00000002.parquet", {"a": PROMPT})
    assert again.seed == 7


def test_a_step_has_prompts_the_text_of_each_token_and_its_log_ratio(tmp_path: Path) -> None:
    path = tmp_path / "rollouts" / "step_00000000.parquet"
    stats = dataclasses.replace(
        STATS,
        token_logprobs=array("f", [-0.5, -1.0, -1.5, -2.0, -2.5]),
        reference_token_logprobs=array("f", [-1.0, -1.0, -1.0, -1.0, -2.75]),
    )
    asked: list[int] = []

    def detokenize(token_ids: Sequence[int]) -> str:
        asked.extend(token_ids)
        return decoded(token_ids)

    files = RolloutFiles(tmp_path, None, detokenize)
    files.begin(0)
    files.write(0, ROLLOUTS, stats)
    files.write(1, ROLLOUTS, stats)
    assert sorted(asked) == [2, 5, 151_642]  # each once
    across, unscored, empty = rollout_files.read_step(path)
    assert across.pieces == ("<5>", "<151642>", "") and across.logratios == (0.5, 0.0, -0.5)
    assert (across.prompt, across.answer, across.text, across.reward) == ("1 + 1?", "2", "2 é", 1.0)
    assert unscored.reward is None and unscored.logratios == (-1.0, 0.25) and empty.pieces == empty.logratios == ()
    assert list(rollout_files.read_step(path, every=2)) == [across, empty]
    assert list(rollout_files.read_step(path, first=1, every=2)) == [unscored]
    assert rollout_files.read(path, {"a": PROMPT, "b": OTHER}) == ROLLOUTS and rollout_files.num_rows(path) == 3


def test_a_file_of_rollouts_that_no_step_wrote_is_refused_by_name(tmp_path: Path) -> None:
    rollout_files.write(tmp_path / "x.parquet", ROLLOUTS)
    with pytest.raises(ValueError, match=r"x\.parquet: damaged .*prompt"):
        list(rollout_files.read_step(tmp_path / "x.parquet"))


def decoded(token_ids: Sequence[int]) -> str:
    return "".join(f"<{token}>" for token in token_ids if token != 2)


def numbered(seed: int) -> Rollout:
    return dataclasses.replace(ACROSS, seed=seed)


def numbers(run_dir: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step_")) for path in (run_dir / "rollouts").iterdir())
