"""The V* table: append, reopen, resume, damage, other contracts, storage that refuses."""

import dataclasses
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from samples import CONTRACT, files_of_at_most
from table_rows import PROMPTS, scored

from astar_megatron.algorithm.value import v_star
from astar_megatron.data.contract import ContractError
from astar_megatron.data.files import StorageError
from astar_megatron.data.header import FORMAT, differences, make_header
from astar_megatron.data.v_star import MissingTableError, TableError, VStarTable
from astar_megatron.types import Prompt, Rollout


def _reward(prompt: int, sample: int) -> float:
    return float((prompt + sample) % 3 == 0)


def _fill(table: VStarTable, prompts: list[Prompt], samples: range) -> None:
    for sample in samples:  # one shard a sample index
        table.append([scored(prompt, sample, _reward(i, sample)) for i, prompt in enumerate(prompts)])


def test_rows_are_there_after_reopening(tmp_path: Path) -> None:
    table = VStarTable.create_or_open(tmp_path / "t", CONTRACT)
    _fill(table, PROMPTS, range(4))
    reopened = VStarTable.open(tmp_path / "t", CONTRACT)
    expected = {prompt.uid: [_reward(i, s) for s in range(4)] for i, prompt in enumerate(PROMPTS)}
    assert table.rewards() == reopened.rewards() == expected
    assert table.summary() == reopened.summary()
    assert (table.summary().prompts, table.summary().samples, table.summary().response_tokens) == (6, 24, 72)


def test_a_shard_holds_everything_about_a_rollout(tmp_path: Path) -> None:
    VStarTable.create_or_open(tmp_path, CONTRACT).append([scored(PROMPTS[0], 3, 1.0)])
    VStarTable.open(tmp_path, CONTRACT).append([scored(PROMPTS[0], 4)], text=True)
    first, second = sorted(tmp_path.glob("shard-*.parquet"))
    assert pq.read_table(second)["text"].to_pylist() == ["text"]
    assert pq.read_table(first).to_pylist() == [
        {
            "uid": "uid-0",
            "sample": 3,
            "reward": 1.0,
            "response": [5, 6, 7],
            "response_tokens": 3,
            "finish_reason": "stop",
            "seed": 1003,
            "logprob": -1.5,
            "text": None,
        }
    ]


def test_missing_is_what_a_sweep_has_still_to_draw(tmp_path: Path) -> None:
    table = VStarTable.create_or_open(tmp_path, CONTRACT)
    assert table.missing(PROMPTS[:2], 2) == [(PROMPTS[0], 0), (PROMPTS[0], 1), (PROMPTS[1], 0), (PROMPTS[1], 1)]
    table.append([scored(PROMPTS[1], 0), scored(PROMPTS[1], 7), scored(PROMPTS[5], 1)])
    assert table.missing([PROMPTS[1], PROMPTS[5]], 2) == [(PROMPTS[1], 1), (PROMPTS[5], 0)]
    assert table.missing([], 8) == []
    table.append([scored(prompt, s) for prompt, s in table.missing(PROMPTS, 4)])
    assert table.missing(PROMPTS, 4) == []
    assert len(table.missing(PROMPTS, 6)) == 12  # more samples buy only the difference


def test_estimate_is_v_star_of_the_first_samples_for_any_beta1(tmp_path: Path) -> None:
    table = VStarTable.create_or_open(tmp_path, CONTRACT)
    _fill(table, PROMPTS, range(5))
    table.append([scored(PROMPTS[0], 5, 1.0)])  # prompts with different numbers of samples
    for beta1 in (0.01, 0.5, 3.0):
        for num_samples in (None, 1, 3, 5):
            estimate = table.estimate(beta1, num_samples=num_samples).by_uid()
            for uid, values in table.rewards().items():
                expected = v_star(torch.tensor(values[:num_samples]), beta1)
                assert estimate[uid] == pytest.approx(float(expected), abs=1e-12)
    chosen = table.estimate(0.5, prompts=[PROMPTS[4], PROMPTS[2]])
    assert chosen.uids == ["uid-4", "uid-2"]


def test_estimate_names_how_many_prompts_lack_rows(tmp_path: Path) -> None:
    table = VStarTable.create_or_open(tmp_path, CONTRACT)
    assert table.estimate(0.5).by_uid() == {}
    _fill(table, PROMPTS[:4], range(2))
    with pytest.raises(MissingTableError, match="2 of 6 prompts have less than 1 samples; run `astar sweep`"):
        table.estimate(0.5, PROMPTS)
    with pytest.raises(MissingTableError, match="4 of 4 prompts have less than 8 samples"):
        table.estimate(0.5, num_samples=8)
    with pytest.raises(TableError, match="at least 1, got 0"):
        table.estimate(0.5, num_samples=0)


def test_of_a_sample_drawn_twice_the_same_row_counts_in_any_order(tmp_path: Path) -> None:
    """Also when a job that was behind gives its shard a number below those of the rows that it draws again."""
    behind, ahead = (VStarTable.create_or_open(tmp_path, CONTRACT) for _ in range(2))
    for sample in range(12):
        ahead.append([scored(PROMPTS[0], sample, 1.0)])
    behind.append([scored(PROMPTS[0], sample, 0.0) for sample in range(12)])
    ahead.refresh()
    behind.refresh()
    rewards = VStarTable.open(tmp_path, CONTRACT).rewards()
    assert ahead.rewards() == behind.rewards() == rewards
    assert 0 < sum(rewards["uid-0"]) < len(rewards["uid-0"]) == 12  # neither the order nor the reward decides
    ahead.append([scored(PROMPTS[0], 0, 0.5), scored(PROMPTS[0], 0, 0.5)])
    assert ahead.rewards() == VStarTable.open(tmp_path, CONTRACT).rewards()


def test_the_lengths_of_responses_are_of_the_samples_that_are_asked_for(tmp_path: Path) -> None:
    table = VStarTable.create_or_open(tmp_path, CONTRACT)
    drawn = [scored(PROMPTS[0], 2), scored(PROMPTS[0], 0), scored(PROMPTS[1], 1), scored(PROMPTS[3], 0)]
    table.append([dataclasses.replace(rollout, token_ids=(5,) * (i + 1)) for i, rollout in enumerate(drawn)])
    prompts = [PROMPTS[1], PROMPTS[2], PROMPTS[0]]
    assert VStarTable.open(tmp_path, CONTRACT).lengths(prompts, np.array([1, 5, 3])) == [[], [], [2, 1]]
    assert table.lengths(prompts, np.array([2, 5, 1])) == [[3], [], [2]]


def test_the_summary_counts_prompts_that_are_all_wrong_or_all_right(tmp_path: Path) -> None:
    table = VStarTable.create_or_open(tmp_path, CONTRACT)
    assert math.isnan(table.summary().mean_reward)
    for prompt, rewards in zip(PROMPTS, [(0, 0), (1, 1), (0, 1), (0, 0.1)], strict=False):
        table.append([scored(prompt, sample, reward) for sample, reward in enumerate(rewards)])
    summary = table.summary()
    assert (summary.all_wrong, summary.all_right, summary.mean_reward) == (0.5, 0.25, pytest.approx(3.1 / 8))


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "torn": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "zeroed": lambda data: data[:4] + bytes(60) + data[64:],
}


@pytest.mark.parametrize("check_whole_bytes", [1 << 20, 0], ids=["whole", "by page"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_shard_is_set_aside_and_its_rows_are_missing_again(
    tmp_path: Path, check_whole_bytes: int, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    _fill(VStarTable.create_or_open(tmp_path, CONTRACT), PROMPTS, range(3))
    (second,) = tmp_path.glob("shard-000002-*")
    second.write_bytes(damage(second.read_bytes()))
    with caplog.at_level(logging.WARNING):
        table = VStarTable.open(tmp_path, CONTRACT, check_whole_bytes, to_fill=True)
    assert "damaged shard set aside" in caplog.text and second.name in caplog.text
    assert table.missing(PROMPTS, 3) == [(prompt, 1) for prompt in PROMPTS]
    assert second.with_suffix(".damaged").exists() and not second.exists()
    table.append([scored(prompt, 1, _reward(i, 1)) for i, prompt in enumerate(PROMPTS)])
    assert VStarTable.open(tmp_path, CONTRACT).missing(PROMPTS, 3) == []


@pytest.mark.parametrize("check_whole_bytes", [1 << 20, 0], ids=["whole", "by page"])
def test_who_only_reads_warns_once_of_a_shard_that_is_still_being_copied_and_leaves_it(
    tmp_path: Path, check_whole_bytes: int, caplog: pytest.LogCaptureFixture
) -> None:
    _fill(VStarTable.create_or_open(tmp_path, CONTRACT), PROMPTS, range(2))
    (second,) = tmp_path.glob("shard-000002-*")
    names, data = sorted(tmp_path.iterdir()), second.read_bytes()
    with second.open("wb") as copy:
        copy.write(data[:-100])
        copy.flush()
        for _ in range(2):
            table = VStarTable.open(tmp_path, CONTRACT, check_whole_bytes)
            assert table.missing(PROMPTS, 2) == [(prompt, 1) for prompt in PROMPTS]
            assert [row.sample for row in table.responses()] == [0] * len(PROMPTS)
        copy.write(data[-100:])
    assert caplog.text.count(f"{second}: damaged shard, its rows count as missing") == len(caplog.records) == 1
    assert sorted(tmp_path.iterdir()) == names
    assert VStarTable.open(tmp_path, CONTRACT, check_whole_bytes).missing(PROMPTS, 2) == []


def test_one_flipped_bit_anywhere_is_detected(tmp_path: Path) -> None:
    VStarTable.create_or_open(tmp_path, CONTRACT).append([scored(PROMPTS[0], 0, 1.0)])
    (shard,) = tmp_path.glob("shard-*")
    data = shard.read_bytes()
    for position in np.random.default_rng(0).integers(len(data), size=20):
        shard.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        assert VStarTable.open(tmp_path, CONTRACT).missing(PROMPTS[:1], 1) == [(PROMPTS[0], 0)]


def test_what_a_killed_writer_leaves_is_ignored(tmp_path: Path) -> None:
    table = VStarTable.create_or_open(tmp_path, CONTRACT)
    table.append([scored(PROMPTS[0], 0)])
    (tmp_path / ".shard-000002-0123456789abcdef.parquet.77.ab.tmp").write_bytes(b"half")
    assert VStarTable.create_or_open(tmp_path, CONTRACT).rewards() == {"uid-0": [0.0]}


def test_another_contract_is_refused_field_by_field(tmp_path: Path) -> None:
    VStarTable.create_or_open(tmp_path, CONTRACT).append([scored(PROMPTS[0], 0, 1.0)])
    other = dataclasses.replace(CONTRACT, temperature=0.7, reward="math/1", model_digest="f" * 64)
    for opened in (VStarTable.open, VStarTable.create_or_open):
        with pytest.raises(ContractError) as caught:
            opened(tmp_path, other)
        message = str(caught.value)
        assert "temperature: this run has 0.7, the table 1.0" in message
        assert "reward: this run has math/1, the table last_number/1" in message
        assert "model digest: this run has ffffffffffff..., the table aaaaaaaaaaaa..." in message
        assert "top p" not in message and "astar sweep" in message


def test_a_table_of_an_older_version_says_so_and_opens_as_its_error_tells(tmp_path: Path) -> None:
    VStarTable.create_or_open(tmp_path, CONTRACT).append([scored(PROMPTS[0], 0, 1.0)])
    header = json.loads((tmp_path / "header.json").read_text())
    del header["contract"]["digest_rule"]
    header["contract"]["model_digest"] = "f" * 64
    (tmp_path / "header.json").write_text(json.dumps(header))
    with pytest.raises(ContractError, match="the table is of an older version of this project") as caught:
        VStarTable.open(tmp_path, CONTRACT)
    (line,) = differences(tmp_path, CONTRACT)  # as `astar sweep --inspect` has it
    assert line in str(caught.value)
    header["contract"] |= json.loads(line.partition("header.json: ")[2])
    (tmp_path / "header.json").write_text(json.dumps(header))
    assert VStarTable.open(tmp_path, CONTRACT).rewards() == {"uid-0": [1.0]}


def test_a_missing_table_says_to_run_the_sweep(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run `astar sweep`") as caught:
        VStarTable.open(tmp_path / "none", CONTRACT)
    assert isinstance(caught.value, FileNotFoundError)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("", "not the header of a V\\* table"),
        ("[]", "not the header of a V\\* table"),
        ('{"format": 1}', "not the header of a V\\* table"),
        ("[" * 100_000, "not the header of a V\\* table"),
        *(
            (f'{{"format": {wrong}, "contract": {{}}}}', f"not the header .*expected {FORMAT}")
            for wrong in ("true", '"1"', "0", "1.0", "1.9", "1e400", "null", "[1]")
        ),
        (json.dumps({"format": FORMAT + 1, "contract": {}}), f"has format {FORMAT + 1}, .* reads up to {FORMAT}"),
    ],
)
def test_a_foreign_or_newer_header_is_refused(tmp_path: Path, header: str, message: str) -> None:
    (tmp_path / "header.json").write_text(header)
    with pytest.raises(TableError, match=message):
        VStarTable.create_or_open(tmp_path, CONTRACT)
    assert (tmp_path / "header.json").read_text() == header


def test_shards_without_a_header_are_not_adopted(tmp_path: Path) -> None:
    VStarTable.create_or_open(tmp_path, CONTRACT).append([scored(PROMPTS[0], 0)])
    (tmp_path / "header.json").unlink()
    for opened in (VStarTable.open, VStarTable.create_or_open):
        with pytest.raises(
            TableError, match=r"V\* shards without header\.json.*restore it.*or choose another"
        ) as caught:
            opened(tmp_path, CONTRACT)
        assert not isinstance(caught.value, MissingTableError)  # which others take as: still to be swept
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (scored(PROMPTS[0], 4, math.nan), "sample 4 of prompt uid-0 is nan"),
        (scored(PROMPTS[0], 4, math.inf), "sample 4 of prompt uid-0 is inf"),
        (scored(PROMPTS[0], -1), "sample is uint32"),
        (dataclasses.replace(scored(PROMPTS[0], 0), seed=2**64), "seed is int64"),
    ],
    ids=["nan", "inf", "sample", "seed"],
)
def test_a_rollout_with_a_value_that_no_row_may_have_is_refused(tmp_path: Path, wrong: Rollout, words: str) -> None:
    table = VStarTable.create_or_open(tmp_path, CONTRACT)
    with pytest.raises(TableError, match=words):
        table.append([scored(PROMPTS[1], 0), wrong])
    table.append([])
    assert table.rewards() == {} and not list(tmp_path.glob("shard-*"))


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    table = VStarTable.create_or_open(tmp_path, CONTRACT)
    _fill(table, PROMPTS, range(2))
    before = sorted(path.name for path in tmp_path.iterdir())
    with files_of_at_most(100), pytest.raises(StorageError, match="free some space"):
        _fill(table, PROMPTS, range(2, 3))
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert len(table.missing(PROMPTS, 3)) == 6
    _fill(table, PROMPTS, range(2, 3))  # the same table goes on once there is space
    assert VStarTable.open(tmp_path, CONTRACT).missing(PROMPTS, 3) == []


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file/t: can't create the folder.*choose another"):
        VStarTable.create_or_open(tmp_path / "file" / "t", CONTRACT)


def test_a_table_without_rows_keeps_its_contract_for_the_job_that_draws(tmp_path: Path) -> None:
    drawing = VStarTable.create_or_open(tmp_path, CONTRACT)
    other = dataclasses.replace(CONTRACT, temperature=CONTRACT.temperature / 2)
    with pytest.raises(ContractError, match=r"(?s)temperature.*no rows yet: if no job draws for it, delete"):
        VStarTable.create_or_open(tmp_path, other)
    make_header(tmp_path, other)  # by a job that was at it at the same time
    drawing.append([scored(PROMPTS[0], 0, 1.0)])
    assert VStarTable.open(tmp_path, CONTRACT).rewards() == {"uid-0": [1.0]}


def test_rows_are_not_written_into_another_contracts_table(tmp_path: Path) -> None:
    drawing = VStarTable.create_or_open(tmp_path, CONTRACT)
    (tmp_path / "header.json").unlink()  # deleted by hand, and made anew
    VStarTable.create_or_open(tmp_path, dataclasses.replace(CONTRACT, reward="math/1"))
    with pytest.raises(ContractError, match="reward: this run has last_number/1, the table math/1"):
        drawing.append([scored(PROMPTS[0], 0, 1.0)])
    assert not list(tmp_path.glob("shard-*"))
