"""The configurations that jobs read: copies of what was checked, so that what is edited later changes none of them.

A copy is `<job>-<digest>.json`, with a digest of what stands in it. It has what the run's file, its base and the words
of the command line say, and all of it but the section slurm: a job submits nothing.
"""

import hashlib
from dataclasses import replace
from pathlib import Path

from astar_megatron.config import RunConfig, as_json
from astar_megatron.data.files import make_folder, write_atomic
from astar_megatron.launch.stages import Job


def with_copy(job: Job, cfg: RunConfig, folder: Path, *, dry_run: bool = False) -> Job:
    """Return a job that reads a copy of `cfg` in a folder; written there, but for a dry run. Raises StorageError."""
    tree = cfg.model_dump(exclude_unset=True) | {"slurm": {"backend": "local"}}
    text = as_json(tree).encode()
    file = folder / f"{job.name}-{hashlib.sha256(text).hexdigest()[:12]}.json"
    if not dry_run:
        make_folder(folder)
        write_atomic(file, text)
    return replace(job, config_file=str(file), words=())
