"""What Megatron computes from a distributed checkpoint: the model alone, on one rank, in a process of its own.

    python -m astar_megatron.model.alone CHECKPOINT MODEL_FOLDER < sequences.json

reads sequences of token ids and prints, as the last line, the log-probs of each but their first tokens, as JSON.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.models.gpt import GPTModel
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from astar_megatron.algorithm.packing import pack
from astar_megatron.model import backend as backends
from astar_megatron.model.build import build, initialise, transformer_config
from astar_megatron.model.forward import run_scoring
from conversion.checkpoint_index import plain_in_torch
from conversion.families import read_model
from conversion.tiles import ParallelLayout


def logprobs(folder: Path, model_folder: Path, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    """Return each sequence's log-probs (nats) in float32; `model_folder` holds the config.json of what `folder` holds.

    Megatron loads the weights as it would to train them. Once in a process, which becomes the one rank. ValueError
    where Megatron can't load them.
    """
    backend = backends.choose()
    backends.stay_on_loopback()
    dist.init_process_group(backend.collectives, store=HashStore(), rank=0, world_size=1)
    layout = ParallelLayout(fused_norms=backend.uses_transformer_engine)
    initialise(layout)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    model = read_model(model_folder)
    (part,) = build(model, layout, transformer_config(model, layout, torch.float32, backend), backend)
    _fill(part, folder)
    packed = pack(sequences, [1] * len(sequences), share_prefix=backend.shares_prefix)
    (scores,) = run_scoring([part], [packed], vocab_size=model.vocab_size, temperature=1.0, backend=backend)
    return packed.by_sequence(scores)


def _fill(part: GPTModel, folder: Path) -> None:
    """Loads the weights; what Transformer Engine keeps beside them is not asked for, not every writer has it."""
    backends.read_no_code()
    plain_in_torch()
    state = {name: entry for name, entry in part.sharded_state_dict().items() if not name.endswith("_extra_state")}
    try:
        loaded: Any = dist_checkpointing.load(state, str(folder))
        part.load_state_dict(loaded, strict=False)
    except Exception as error:  # torch and megatron raise a dozen kinds
        raise ValueError(f"Megatron can't load {folder}: {type(error).__name__}: {error!s:.300}") from None


def main() -> None:
    """Answer standard input; what the user can mend ends as one line of standard error and exit status 1."""
    sequences = json.load(sys.stdin)
    try:
        print(json.dumps(logprobs(Path(sys.argv[1]), Path(sys.argv[2]), sequences)))
    except ValueError as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
