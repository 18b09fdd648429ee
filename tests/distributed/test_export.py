"""An export is the same whether its ranks share memory or not (real ranks)."""

import json
from pathlib import Path
from typing import Any

import ranks as work
from ranks import Job
from test_layouts import batch


def test_an_export_between_ranks_that_share_no_memory_is_the_same(ranks: Any, tied_llama: Path, tmp_path: Path) -> None:
    job = Job(str(tied_llama), tensor=2)
    places = {"shared": tmp_path, "apart": tmp_path / "a folder that no rank sees"}
    for name, shared in places.items():
        folders = {"save": str(tmp_path / f"{name}.checkpoint"), "folder": str(tmp_path / name)}
        ranks.run(work.exported, job.world_size, job=job, batches=[batch(3)], shared=str(shared), **folders)
    shared, apart = (json.loads((tmp_path / name / "conversion.json").read_text()) for name in places)
    assert shared["digests"] == apart["digests"]
    files = [path.name for path in (tmp_path / "shared").glob("*.safetensors")]
    assert files
    for file in files:
        assert (tmp_path / "shared" / file).read_bytes() == (tmp_path / "apart" / file).read_bytes()
