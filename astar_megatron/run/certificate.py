"""What Megatron's model says beside what transformers says with its Hugging Face folder, on fixed tokens.

Digests show that an export holds the same weights. This shows that they mean the same there: the log-probs (nats) that
Megatron gives the tokens of fixed sequences, against those of transformers. The difference goes into conversion.json.
Above a limit the two compute different models: an error, and what was written stays.
"""

import importlib.metadata
import json
import math
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from astar_megatron.cluster.processes import python
from astar_megatron.model.backend import FLOAT32_ENVIRONMENT
from astar_megatron.run import resources
from conversion import folders
from conversion.ends import End, MegatronEnd
from conversion.families import read_model

MAX_WEIGHT_BYTES = 8 * 10**9  # the program's process holds transformers' copy; above this it is not made
_LENGTHS = (5, 23, 41, 64)
# Nats that two right programs may differ by on one token, with the same weights in the compute type of the export.
# transformers in bfloat16 is 0.42 away from itself in float32 for SmolLM2-135M, and 1.8 with one gate and up swapped.
_LIMITS = {"float32": 1e-3, "bfloat16": 1.0}

_USUAL_LOGIT = 32.0  # rounding grows with the logits: one of 173 was 0.003 nats from itself, by two ways of attention

_NOT_MEASURED, _NOT_COMPARED = "not measured", "not compared"  # how the reason begins: too large; of an error

LogProbs = Callable[[Sequence[Sequence[int]], Sequence[int]], list[list[float]]]


class DisagreementError(ValueError):
    """transformers computes another model than Megatron from the same weights; the message names the folder."""


def fixed_sequences(vocab_size: int, max_tokens: int) -> list[list[int]]:
    """Return the same few sequences of tokens from all over the vocabulary at every call; a log-prob needs two."""
    max_tokens = max(2, max_tokens)
    return [
        [(104729 * (i + 1) + 7919 * j * (i + j)) % vocab_size for j in range(min(length, max_tokens))]
        for i, length in enumerate(_LENGTHS)
    ]


def certify(
    folder: str | Path,
    logprobs: LogProbs,
    *,
    record_in: str | Path | None = None,
    dtype: str = "auto",
    max_weight_bytes: int = MAX_WEIGHT_BYTES,
) -> str:
    """Write the largest difference into a conversion.json; return it in words.

    `folder` is the Hugging Face folder that transformers reads, in `dtype` or as it is stored; the record is the one
    there or in `record_in`. `logprobs(sequences, prompt_tokens)` are Megatron's, of every token after the prompts.
    Where transformers' copy would be larger than `max_weight_bytes`, null and the reason are written instead. Raises
    DisagreementError, once it is written, if the difference is above the limit of the type or no number at all.
    """
    folder, target = Path(folder), Path(record_in or folder)
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if dtype != "auto":
        num_bytes = read_model(folder).num_parameters() * getattr(torch, dtype).itemsize
    if num_bytes > max_weight_bytes:
        bounds = f"the weights have {num_bytes:,} bytes, transformers is asked up to {max_weight_bytes:,}"
        reason = f"{_NOT_MEASURED}: {bounds}"
        folders.add_to_record(target, {"logprobs": {"max_difference": None, "reason": reason}})
        return reason
    try:
        comparison = _compared(folder, logprobs, dtype)
    except Exception as error:  # transformers raises of all kinds
        reason = f"{_NOT_COMPARED}, {type(error).__name__}: {error!s:.300}"
        folders.add_to_record(target, {"logprobs": {"max_difference": None, "reason": reason}})
        raise ValueError(
            f"{target} is written and holds the weights that it was made from, but it is {reason}"
        ) from error
    agrees, reason = _judged(comparison)
    folders.add_to_record(target, {"logprobs": comparison if agrees else comparison | {"reason": reason}})
    if not agrees:
        raise DisagreementError(
            f"{target} is written and holds the weights that it was made from, but it can't be trusted: {reason}. One "
            "of the two does not compute what config.json says; find out which before you use it. What it was made "
            "from is kept, and the same command writes it again"
        )
    return reason


def doubt(record: Mapping[str, Any]) -> str:
    """Return why a folder with this conversion.json is not to be given to others: nobody has compared it, or it failed.

    "" where it agrees, or is too large to be compared.
    """
    reason = str((record.get("logprobs") or {"reason": "nobody has compared them yet"}).get("reason", ""))
    return "" if reason.startswith(_NOT_MEASURED) else without_words(reason)


def without_words(reason: str) -> str:
    """Return the reason of a record without the words of an error, which may name a path of this machine."""
    return reason.partition(": ")[0] if reason.startswith(_NOT_COMPARED) else reason


def certify_conversion(source: End, destination: Path) -> str:
    """Compare what Megatron computes from one of the folders with transformers on the other; returns that in words.

    In float32 whatever the weights are stored in, so that a small error shows.
    """
    from_megatron = source.kind == MegatronEnd.kind
    megatron, hugging_face = (source.path, destination) if from_megatron else (destination, source.path)

    def logprobs(sequences: Sequence[Sequence[int]], _prompt_tokens: Sequence[int]) -> list[list[float]]:
        variables = [f"{name}={value}" for name, value in FLOAT32_ENVIRONMENT.items()]
        code = "from astar_megatron.model import alone; alone.main()"
        command = ["env", *variables, *python(code, str(megatron), str(hugging_face))]
        done = subprocess.run(command, input=json.dumps(sequences), capture_output=True, text=True, check=False)
        if done.returncode:
            last_line = done.stderr.strip().splitlines()[-1:] or [f"its process ended with {done.returncode}"]
            raise ValueError(last_line[0])
        return json.loads(done.stdout.splitlines()[-1])

    most = min(MAX_WEIGHT_BYTES, resources.available_memory_bytes() // 2)
    return certify(hugging_face, logprobs, record_in=destination, dtype="float32", max_weight_bytes=most)


def _judged(comparison: dict[str, Any]) -> tuple[bool, str]:
    """Whether Megatron and transformers agree, and that in words."""
    worst, limit, against = comparison["max_difference"], comparison["limit"], comparison["against"]
    if worst is None:
        return False, f"the log-probs of {' and of '.join(comparison['not_finite'])} are not finite numbers ({against})"
    if worst > limit:
        return False, f"log-probs differ by {worst:.3g} nats from those of {against}, more than {limit:g}"
    return True, f"log-probs within {worst:.1e} of transformers'"


def _compared(folder: Path, logprobs: LogProbs, dtype: str) -> dict[str, Any]:
    options = read_model(folder).gpt_options()
    sequences = fixed_sequences(options["vocab_size"], options["max_sequence_length"])
    ours = torch.cat([torch.tensor(row) for row in logprobs(sequences, [1] * len(sequences))])
    model = _transformers_model(folder, dtype)
    rows, largest = [], 0.0
    with torch.no_grad():
        for ids in sequences:
            logits = model(torch.tensor([ids])).logits[0, :-1].float()
            largest = max(largest, float(logits.abs().max()))
            rows.append(logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0])
    theirs = torch.cat(rows)
    assert ours.shape == theirs.shape
    sides = {"Megatron": ours, "transformers": theirs}
    not_finite = [name for name, side in sides.items() if not side.isfinite().all()]
    used = str(model.dtype).removeprefix("torch.")
    comparison: dict[str, Any] = {
        "max_difference": None if not_finite else float((theirs - ours).abs().max()),
        "limit": _LIMITS[used] * max(1.0, largest / _USUAL_LOGIT if math.isfinite(largest) else 0.0),
        "tokens": len(ours),
        "against": f"transformers {importlib.metadata.version('transformers')}, {used}, CPU",
    }
    return comparison | ({"not_finite": not_finite} if not_finite else {})


def _transformers_model(folder: Path, dtype: str) -> Any:
    """Return the folder's model, whatever its config.json asks for that is not of the model itself."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(folder, return_dict=True, torchscript=False, trust_remote_code=False)
    return AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype, attn_implementation="eager", trust_remote_code=False
    ).eval()
