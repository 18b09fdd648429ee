"""Tables of many shards: damage, other jobs' shards, what an append and a look-up touch, storage that refuses."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from samples import CONTRACT, files_of_at_most
from table_rows import PROMPTS, scored

from astar_megatron.data.files import StorageError
from astar_megatron.data.leases import Leases
from astar_megatron.data.v_star import VStarTable
from astar_megatron.types import Prompt


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made")


@pytest.fixture
def many(tmp_path: Path, made: Path) -> tuple[Path, list[Prompt]]:
    """A table of 600 shards, each of one row, of 150 prompts."""
    prompts = [Prompt(uid=f"{i:032x}", token_ids=(i,), text="", answer="") for i in range(150)]
    if not (made / "t").exists():
        table = VStarTable.create_or_open(made / "t", CONTRACT)
        for i in range(600):
            table.append([scored(prompts[i % 150], i // 150, float(i % 7 == 0), tokens=1 + i % 5)])
    shutil.copytree(made / "t", tmp_path / "t")
    return tmp_path / "t", prompts


def opened(folder: Path) -> VStarTable:
    """As a table too large to be read whole."""
    return VStarTable.open(folder, CONTRACT, check_whole_bytes=0)


def test_indexes_that_an_earlier_version_wrote_are_not_read(many: tuple[Path, list[Prompt]]) -> None:
    folder, prompts = many
    expected = VStarTable.open(folder, CONTRACT)
    (folder / "index-0123456789abcdef.parquet").write_bytes(b"of another format")
    large = opened(folder)
    assert large.rewards() == expected.rewards() and large.summary() == expected.summary()
    assert not large.missing(prompts, 4) and len(large.missing(prompts, 5)) == 150


def test_a_torn_shard_of_many_is_set_aside(many: tuple[Path, list[Prompt]]) -> None:
    folder, prompts = many
    shards = sorted(folder.glob("shard-*"))
    shards[0].write_bytes(shards[0].read_bytes()[:50])
    shards[7].write_bytes(b"")
    shards[9].unlink()
    torn = VStarTable.open(folder, CONTRACT, check_whole_bytes=0, to_fill=True)
    assert torn.missing(prompts, 4) == [(prompts[0], 0), (prompts[7], 0), (prompts[9], 0)]
    assert len(list(folder.glob("*.damaged"))) == 2


def test_rows_of_a_shard_that_is_gone_are_missing(many: tuple[Path, list[Prompt]]) -> None:
    folder, prompts = many
    min(folder.glob("shard-*")).unlink()
    assert opened(folder).missing(prompts, 4) == [(prompts[0], 0)]


def test_of_a_sample_drawn_twice_the_same_row_counts_however_the_table_is_read(many: tuple[Path, list[Prompt]]) -> None:
    folder, prompts = many
    late = VStarTable.create_or_open(folder, CONTRACT)
    for i in range(256):
        late.append([scored(prompts[i % 150], i // 150, -5.0)])
    assert opened(folder).rewards() == VStarTable.open(folder, CONTRACT).rewards() == late.rewards()
    counted = sum(rewards.count(-5.0) for rewards in late.rewards().values())
    assert 90 < counted < 166  # half of 256; 8 a standard deviation


def test_refresh_reads_what_other_jobs_added_and_nothing_else(many: tuple[Path, list[Prompt]]) -> None:
    folder, prompts = many
    first, second = (VStarTable.open(folder, CONTRACT) for _ in range(2))
    new = Prompt(uid="new", token_ids=(7,), text="", answer="")
    second.append([scored(prompts[5], 4, 1.0), scored(new, 1, 1.0)])
    assert first.missing([prompts[5], new], 5)[0] == (prompts[5], 4)
    for path in sorted(folder.glob("shard-*"))[:600]:
        path.write_bytes(b"not read again")
    first.refresh()
    assert first.missing([prompts[5], new], 5) == [(new, 0), (new, 2), (new, 3), (new, 4)]
    assert first.missing([new, prompts[5]], 2) == [(new, 0)]


def test_a_shard_that_another_job_sets_aside_meanwhile_is_missing(many: tuple[Path, list[Prompt]]) -> None:
    folder, prompts = many
    (folder / "shard-000000-gone.parquet").symlink_to("nowhere")  # listed, and not there when it is read
    for check_whole_bytes in (1 << 20, 0):
        assert not VStarTable.open(folder, CONTRACT, check_whole_bytes).missing(prompts, 4)


def test_many_small_lookups_between_appends_agree_with_the_table_read_anew(tmp_path: Path) -> None:
    chance = np.random.default_rng(1)
    prompts = [Prompt(uid=f"u{i}", token_ids=(i,), text="", answer="") for i in range(40)]
    table, there = VStarTable.create_or_open(tmp_path, CONTRACT), set()
    for step in range(60):
        rows = [(int(chance.integers(40)), int(chance.integers(6))) for _ in range(5)]
        table.append([scored(prompts[i], n, 1.0) for i, n in rows])
        there.update(rows)
        if step % 20 == 7:
            table.summary()  # which sorts the rows
        some = chance.permutation(40)[:7]
        wanted = chance.integers(1, 7, size=7)
        expected = [(prompts[i], n) for i, w in zip(some, wanted, strict=True) for n in range(w) if (i, n) not in there]
        assert table.missing([prompts[i] for i in some], wanted) == expected
        lacking = [sum((i, n) not in there for n in range(w)) for i, w in zip(some, wanted, strict=True)]
        if step % 20 == 3:
            assert table.lacking([prompts[i] for i in some], wanted).tolist() == lacking


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become a user who may not write")
def test_a_read_only_table_can_be_read_and_refuses_a_sweep_by_name(many: tuple[Path, list[Prompt]]) -> None:
    folder, _ = many
    for path in (folder, *folder.parents, *folder.iterdir()):
        if path.stat().st_mode & 0o055 != 0o055:
            path.chmod(path.stat().st_mode | 0o055)
    expected = VStarTable.open(folder, CONTRACT).summary()
    os.seteuid(65534)
    try:
        assert opened(folder).summary() == expected
        with pytest.raises(StorageError, match="make the folder writable"), Leases(folder / "leases"):
            pass
    finally:
        os.seteuid(0)


def test_a_full_disk_during_leases_is_a_clear_error(tmp_path: Path) -> None:
    VStarTable.create_or_open(tmp_path, CONTRACT)
    with (
        files_of_at_most(10),
        pytest.raises(StorageError, match="can't take leases"),
        Leases(tmp_path / "leases"),
    ):
        pass


def test_a_row_in_memory_is_its_small_columns(tmp_path: Path) -> None:
    """Twenty bytes, whatever its response: prompt, sample, reward and number of tokens."""
    table = VStarTable.create_or_open(tmp_path, CONTRACT)
    table.append([scored(PROMPTS[0], sample, tokens=100) for sample in range(8)])
    (rows,) = VStarTable.open(tmp_path, CONTRACT)._new
    assert len(rows) == 8 and rows.nbytes == 8 * 20
