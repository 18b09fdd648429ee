"""What the trained model says beside what transformers says with its export, on fixed tokens: for conversion.json.

Digests show that an export holds the policy's weights. This shows that they mean the same there: the log-probs (nats)
that Megatron gives the tokens of fixed sequences, against those of transformers with the exported folder. Above a limit
the two compute different models, and the run ends with an error; the export stays.
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
# Nats that two right programs may differ by on one token, with the same weights in the compute type of the export.
# transformers in bfloat16 is 0.42 away from itself in float32 for SmolLM2-135M, and 1.8 with one gate and up swapped.
_LIMITS = {"float32": 1e-3, "bfloat16": 1.0}

LogProbs = Callable[[Sequence[Sequence[int]], Sequence[int]], list[list[float]]]


class DisagreementError(ValueError):
    """transformers computes another model from an export than the policy is; the message names the folder."""


def fixed_sequences(vocab_size: int, max_tokens: int) -> list[list[int]]:
    """Return the same few sequences of tokens from all over the vocabulary at every call."""
    return [
        [(104729 * (i + 1) + 7919 * j * (i + j)) % vocab_size for j in range(min(length, max_tokens))]
        for i, length in enumerate(_LENGTHS)
    ]


def certify(folder: str | Path, logprobs: LogProbs, max_weight_bytes: int = MAX_WEIGHT_BYTES) -> str:
    """Write the largest difference into the export's conversion.json; return it in words.

    `logprobs(sequences, prompt_tokens)` are the policy's, of every token after the prompts, whose weights lie in
    `folder`. Above `max_weight_bytes` null and the reason are written instead. Raises DisagreementError, once it is
    written, if the difference is above the limit of the export's type or no number at all.
    """
    folder = Path(folder)
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if num_bytes > max_weight_bytes:
        reason = f"not measured: the weights have {num_bytes:,} bytes, transformers is asked up to {max_weight_bytes:,}"
        found: dict[str, Any] = {"max_difference": None, "reason": reason}
        agrees = True
    else:
        found = _compared(folder, logprobs)
        agrees, reason = _judged(found)
        found |= {} if agrees else {"reason": reason}
    record = (folders.read_record(folder) or {}) | {"logprobs": found}
    write_atomic(folder / folders.RECORD, folders.json_text(record).encode())
    if not agrees:
        raise DisagreementError(
            f"the export {folder} is written and its weights are the policy's, but it can't be trusted: {reason}. "
            "One of the two does not compute what config.json says; find out which before you use the export. The "
            "run's checkpoints are kept, and the same command exports again"
        )
    return reason


def _judged(found: dict[str, Any]) -> tuple[bool, str]:
    """Whether the policy and transformers agree, and that in words."""
    worst, limit, against = found["max_difference"], found["limit"], found["against"]
    if worst is None:
        return False, f"the log-probs of {' and of '.join(found['not_finite'])} are not finite numbers ({against})"
    if worst > limit:
        return False, f"log-probs differ by {worst:.3g} nats from those of {against}, more than {limit:g}"
    return True, f"log-probs within {worst:.1e} of transformers'"


def _compared(folder: Path, logprobs: LogProbs) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    options = read_model(folder).gpt_options()
    sequences = fixed_sequences(options["vocab_size"], options["max_sequence_length"])
    ours = torch.cat([torch.tensor(row) for row in logprobs(sequences, [1] * len(sequences))])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    rows = []
    with torch.no_grad():
        for ids in sequences:
            logits = model(torch.tensor([ids])).logits[0, :-1].float()
            rows.append(logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0])
    theirs = torch.cat(rows)
    assert ours.shape == theirs.shape
    sides = {"the policy": ours, "transformers": theirs}
    not_finite = [name for name, side in sides.items() if not side.isfinite().all()]
    dtype = str(model.dtype).removeprefix("torch.")
    found: dict[str, Any] = {
        "max_difference": None if not_finite else float((theirs - ours).abs().max()),
        "limit": _LIMITS[dtype],
        "tokens": len(ours),
        "against": f"transformers {importlib.metadata.version('transformers')}, {dtype}, CPU",
    }
    return found | ({"not_finite": not_finite} if not_finite else {})
