"""One checkpoint on its way to disk: copied at once, written by a thread of each rank while training goes on.

Megatron plans who writes what and in which format. Its own asynchronous writers are not used: one forks this process,
which has threads and may have a GPU; the other needs a GPU. Host memory holds the copy until it is written.
"""

import errno
import os
import queue
import shutil
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

from astar_megatron.data.files import StorageError, storage_error
from astar_megatron.data.manifest import FileDigest, digest_of
from astar_megatron.types import SaveState
from conversion import folders

# Megatron would start a server process, for results on their way between processes; here they stay in one.
filesystem_async._results_queue = queue.Queue()  # pyright: ignore[reportAttributeAccessIssue]

_BYTES_AROUND_A_TENSOR = 4096  # torch.save's own


class _Plan(TorchDistSaveShardedStrategy):
    """Plans a save as Megatron does, and keeps the plan instead of carrying it out."""

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any, async_strategy: str) -> Any:
        self.writer, self.metadata = writer, save_state_dict_ret[1]  # metadata: rank 0's only
        return AsyncRequest(None, (), [])


class Saving:
    """This rank's part of one checkpoint. Making it is collective: it copies `state` and begins to write.

    `folder` exists and is empty; what it gets is a checkpoint after `finish`. Raises StorageError, on all ranks, where
    the disk has no room for it: filling it would stop whatever else writes there. `thread` has one.
    """

    def __init__(self, folder: Path, state: dict[str, Any], thread: Executor) -> None:
        self._folder, self._plan = folder, _Plan()
        tensors, _ = extract_sharded_tensors_and_factories(state)
        storages = {entry.data.untyped_storage().data_ptr() for entry in nested_values(tensors)}
        dist_checkpointing.save(state, str(folder), self._plan, async_sharded_save=True, async_strategy="mcore")
        self._buckets = self._plan.writer.write_buckets
        _check_room(folder, self._buckets)
        for _, _, (_, written) in self._buckets:
            for index, (item, tensor) in enumerate(written):
                if tensor.device.type != "cpu" or tensor.untyped_storage().data_ptr() in storages:
                    written[index] = item, tensor.to("cpu", copy=True)  # others are copies that Megatron has made
        self._writing: Future[tuple[list[Any], dict[str, FileDigest]]] = thread.submit(self._write)

    def state(self, *, wait: bool) -> SaveState:
        """Return whether this rank's files are written, and in words why not; with `wait` when that is known."""
        if not wait and not self._writing.done():
            return SaveState(done=False)
        error = self._writing.exception()
        return SaveState(done=True, problem=_words(self._folder, error) if error else "")

    def finish(self, model_folder: Path) -> dict[str, FileDigest]:
        """Write what makes the ranks' files one checkpoint and return the digests of this rank's; collective.

        All ranks have written. config.json and tokenizer of `model_folder` lie beside, so that `astar convert` can read
        it alone. Raises StorageError on rank 0, which writes.
        """
        records, digests = self._writing.result()
        everywhere: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(records, everywhere)
        if everywhere is not None:
            try:
                self._plan.writer.finish(self._plan.metadata, everywhere)
                save_config(CheckpointingConfig(self._plan.backend, self._plan.version), str(self._folder))
                shutil.copyfile(model_folder / "config.json", self._folder / "config.json")
                folders.copy_companions(model_folder, self._folder)
            except OSError as error:
                raise storage_error(f"{self._folder}: can't be written", error) from error
            except folders.ModelFolderError as error:  # of the model's folder, which has changed since the run began
                raise StorageError(f"{self._folder}: can't be written: {error}") from error
        return digests

    def _write(self) -> tuple[list[Any], dict[str, FileDigest]]:
        """Write this rank's files; return Megatron's records of what lies where in them, and their digests."""
        records, digests, transforms = [], {}, [self._plan.writer.transforms]
        try:
            for bucket in self._buckets:
                path, name, _ = bucket
                outcome: Any = FileSystemWriterAsync.write_preloaded_data(transforms, 0, bucket, None, None, True)
                if isinstance(outcome[1], Exception):
                    raise outcome[1]
                records += outcome[1]
                digests[name] = digest_of(Path(path))
            return records, digests
        finally:
            self._buckets.clear()  # and with them the copies


def _check_room(folder: Path, buckets: Sequence[Any]) -> None:
    """Raise StorageError, on all ranks, if the files of all do not fit into what is free; collective."""
    need = sum(
        sum(data.getbuffer().nbytes for _, data in objects)
        + sum(tensor.nbytes + _BYTES_AROUND_A_TENSOR for _, tensor in tensors)
        for _, _, (objects, tensors) in buckets
    )
    everywhere: list[tuple[int, int]] = [(0, 0)] * dist.get_world_size()
    dist.all_gather_object(everywhere, (need, shutil.disk_usage(folder).free))  # nobody writes before all have looked
    need, free = sum(need for need, _ in everywhere), min(free for _, free in everywhere)
    if need > free:
        problem = f"{folder}: {need:,} bytes are to be written, {free:,} are free"
        raise storage_error(problem, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


def _words(folder: Path, error: BaseException) -> str:
    """Return why a write failed; torch wraps what the system says."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    problem = f"{folder}: can't be written"
    return str(storage_error(problem, cause)) if cause else f"{problem} ({type(error).__name__}: {error})"
