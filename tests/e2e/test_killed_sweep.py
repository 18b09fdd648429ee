"""Stage 1 with the real engine, killed and run again (tests/test_sweep.py does it twenty times with a fake one)."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from sweep_jobs import rows


@pytest.mark.slow
def test_a_killed_sweep_that_is_run_again_has_the_rows_of_a_whole_one(
    run_tree: Any, tied_llama: Path, tmp_path: Path
) -> None:
    tree = run_tree(tied_llama)
    tree["sweep"]["num_samples"] = 20  # 240 rows, in shards of 32

    def sweep(run: str, until_shards: int = 1000) -> int | None:
        file, table = tmp_path / f"{run}.yaml", tmp_path / run / "v_star"
        file.write_text(yaml.safe_dump(tree | {"run_dir": str(tmp_path / run)}))
        command = [sys.executable, "-m", "astar_megatron.cli", "sweep", "--config", str(file)]
        with subprocess.Popen(command, cwd=Path(__file__).parent, start_new_session=True) as process:
            while process.poll() is None:
                if len(list(table.glob("shard-*"))) >= until_shards:
                    process.kill()
                time.sleep(0.02)
        return process.returncode

    assert sweep("whole") == 0
    assert sweep("killed", until_shards=2) == -9
    before = rows(tmp_path / "killed")
    assert 0 < len(before) < 240
    assert sweep("killed") == 0
    whole, killed = rows(tmp_path / "whole"), rows(tmp_path / "killed")
    assert len(whole) == len(killed) == 240
    for row, other in zip(whole, killed, strict=True):
        assert row.pop("logprob") == pytest.approx(other.pop("logprob"), abs=1e-4)  # summed in another batch
        assert row == other
    assert [row | {"logprob": 0} for row in before] == [
        row | {"logprob": 0}
        for row in killed
        if (row["uid"], row["sample"]) in {(r["uid"], r["sample"]) for r in before}
    ]
