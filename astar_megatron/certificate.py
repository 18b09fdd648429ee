"""What the trained model says beside what transformers says with its export, on fixed tokens: for conversion.json.

Digests show that an export holds the policy's weights. This shows that they mean the same there: the log-probs (nats)
that Megatron gives the tokens of fixed sequences, against those of transformers with the exported folder.
"""

import importlib.metadata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from astar_megatron.data.files import write_atomic
from conversion import folders
from conversion.families import read_model

MAX_WEIGHT_BYTES = 8 * 10**9  # the program's process holds transformers' copy; above this it is not made
_LENGTHS = (5, 23, 41, 64)

LogProbs = Callable[[Sequence[Sequence[int]], Sequence[int]], list[list[float]]]


def fixed_sequences(vocab_size: int, max_tokens: int) -> list[list[int]]:
    """Return the same few sequences of tokens from all over the vocabulary at every call."""
    return [
        [(104729 * (i + 1) + 7919 * j * (i + j)) % vocab_size for j in range(min(length, max_tokens))]
        for i, length in enumerate(_LENGTHS)
    ]


def certify(folder: str | Path, logprobs: LogProbs, max_weight_bytes: int = MAX_WEIGHT_BYTES) -> str:
    """Write the largest difference into the export's conversion.json; return it in words.

    `logprobs(sequences, prompt_tokens)` are the policy's, of every token after the prompts, whose weights lie in
    `folder`. Above `max_weight_bytes` null and the reason are written instead.
    """
    folder = Path(folder)
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if num_bytes > max_weight_bytes:
        reason = f"not measured: the weights have {num_bytes:,} bytes, transformers is asked up to {max_weight_bytes:,}"
        found: dict[str, Any] = {"max_difference": None, "reason": reason}
    else:
        found = _compared(folder, logprobs)
        reason = f"log-probs within {found['max_difference']:.1e} of transformers'"
    record = (folders.read_record(folder) or {}) | {"logprobs": found}
    write_atomic(folder / folders.RECORD, folders.json_text(record).encode())
    return reason


def _compared(folder: Path, logprobs: LogProbs) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    options = read_model(folder).gpt_options()
    sequences = fixed_sequences(options["vocab_size"], options["max_sequence_length"])
    ours = logprobs(sequences, [1] * len(sequences))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    worst = 0.0
    with torch.no_grad():
        for ids, mine in zip(sequences, ours, strict=True):
            logits = model(torch.tensor([ids])).logits[0, :-1].float()
            theirs = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            worst = max(worst, float((theirs - torch.tensor(mine)).abs().max()))
    return {
        "max_difference": worst,
        "tokens": sum(len(ids) - 1 for ids in sequences),
        "against": f"transformers {importlib.metadata.version('transformers')}, {str(model.dtype).split('.')[1]}, CPU",
    }
