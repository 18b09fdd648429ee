"""A small model of experts as both kinds of folder, which tests of conversions read, damage and compare.

What needs packages is imported where it is used: tests of a GPU are collected without them, and skipped by name.
"""

from pathlib import Path

import pytest

from conversion.tiles import ParallelLayout


@pytest.fixture
def source(tmp_path: Path) -> Path:
    from tiny_models import EXPERTS, random_weights, write_folder

    return write_folder(tmp_path / "source", EXPERTS, random_weights(EXPERTS))


@pytest.fixture
def megatron(source: Path, tmp_path: Path) -> Path:
    from conversion import rewrite
    from conversion.ends import open_end

    rewrite.write_megatron(open_end(source), tmp_path / "megatron", ParallelLayout(tensor=2, expert=2, data=2))
    return tmp_path / "megatron"
