"""Batches whose loss or gradient was not finite, kept for inspection: `<run_dir>/bad_batches/step_<n>/`.

    batch.safetensors    what the policy got, and the sums of log-probs that it and the reference gave:
                         token_ids [all tokens], lengths [B], prompt_tokens [B], logprob, reference_logprob [B]
                         float64, and the objective's columns (A*PO: reward, v_star, rollout_logprob [B] float64)
    batch.json           which mini-batches, their gradients' norms, the step's options, and each sequence's prompt,
                         answer, response, log-probs and loss

The folder is written beside under another name and renamed: where it is, it is whole.

Legend: B sequences.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save

from astar_megatron.data.files import make_folder, storage_error, sync
from astar_megatron.data.run_folder import BAD_BATCHES, STEPS, step_name, step_of
from astar_megatron.types import Rollout, RolloutBatch, StepStats


def write(
    run_dir: Path, rollouts: Sequence[Rollout], batch: RolloutBatch, stats: StepStats, options: Mapping[str, object]
) -> Path:
    """Write the batch of one step, replacing one of an earlier try, and return its folder. Raises StorageError.

    `options` are JSON-able: how the step was computed.
    """
    folder = run_dir / BAD_BATCHES / step_name(batch.version)
    temporary = folder.with_suffix(".incomplete")
    shutil.rmtree(temporary, ignore_errors=True)
    make_folder(temporary)
    try:
        # Not by `save_file`, whose files are for their owner alone, whatever the umask.
        (temporary / "batch.safetensors").write_bytes(save(_tensors(batch, stats)))
        text = json.dumps(_words(rollouts, batch, stats, options), indent=1, ensure_ascii=False) + "\n"
        (temporary / "batch.json").write_text(text, encoding="utf-8")
        for path in [*temporary.iterdir(), temporary]:
            sync(path)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        sync(folder.parent)
    except OSError as error:
        raise storage_error(f"{folder}: can't write the batch", error) from error
    return folder


def set_aside(run_dir: Path, step: int) -> None:
    """Rename the folders of steps from `step` on, which a resumed run takes again, to step_<n>.undone."""
    for folder in (run_dir / BAD_BATCHES).glob(STEPS):
        if step_of(folder.name) >= step:
            undone = folder.with_suffix(".undone")
            shutil.rmtree(undone, ignore_errors=True)
            folder.rename(undone)


def _tensors(batch: RolloutBatch, stats: StepStats) -> dict[str, torch.Tensor]:
    return {
        "token_ids": torch.tensor([token for ids in batch.token_ids for token in ids]),
        "lengths": torch.tensor([len(ids) for ids in batch.token_ids]),
        "prompt_tokens": torch.tensor(batch.prompt_tokens),
        **batch.columns,
        **batch.token_columns,
        "logprob": torch.tensor(stats.logprobs, dtype=torch.float64),
        "reference_logprob": torch.tensor(stats.reference_logprobs, dtype=torch.float64),
    }


def _words(
    rollouts: Sequence[Rollout], batch: RolloutBatch, stats: StepStats, options: Mapping[str, object]
) -> dict[str, object]:
    return {
        "version": batch.version,
        "skipped_mini_batches": list(stats.skipped),
        "grad_norms": [str(norm) for norm in stats.grad_norms],  # of each mini-batch
        "options": dict(options),
        "sequences": [
            {
                "uid": rollout.prompt.uid,
                "prompt": rollout.prompt.text,
                "answer": rollout.prompt.answer,
                "response": rollout.text,
                "truncated": rollout.truncated,
                "logprob": str(logprob),
                "reference_logprob": str(reference),
                "loss": str(loss),
            }
            for rollout, logprob, reference, loss in zip(
                rollouts, stats.logprobs, stats.reference_logprobs, stats.losses, strict=True
            )
        ],
    }
