"""What must be equal for V* and training to be comparable: model, tokens, sampling, limits, end of a response, reward.

Stage 1 estimates V* of the reference under one rule; stage 2 regresses on r - V* and evaluation reads the same r. Any
difference between them is a bias that no metric shows, so the contract is stored with every table and compared field
by field. Leaves out what does not change the distribution or the reward: seeds, sample counts, engines, parallelism,
and which prompts (each row carries its prompt's uid).
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from astar_megatron.algorithm import rewards
from astar_megatron.config import RunConfig
from astar_megatron.data import chat
from astar_megatron.data.chat import TokenizerError, stop_token_ids, tokenizer
from conversion.folders import tokenizer_files

type Value = str | int | float | list[int]  # what a field is in JSON

_LEFT_OUT = ("date", "kept_token_ids")  # where they hold nothing
_MOST_SHOWN = 8  # numbers of a list
_BLOCK_BYTES, _THREADS = 1024, 16
_DIGEST_RULE = 2  # raise it when _model_digest changes; contracts of the first rule do not name it


class ContractError(ValueError):
    """Two things made under different contracts were to be used together, or a contract can't be formed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contract:
    """The conditions under which a reward was drawn. Digests are SHA-256, hexadecimal."""

    model_digest: str  # see _model_digest for what it covers
    tokenizer_digest: str  # of the tokenizer's files
    template_digest: str  # of the chat template and data.suffix
    temperature: float
    top_p: float
    max_prompt_tokens: int
    max_response_tokens: int
    stop_token_ids: tuple[int, ...]
    reward: str  # rewards.version
    date: str | None = None  # data.date, where the chat template names the day
    kept_token_ids: tuple[int, ...] = ()  # special tokens that the text for the reward keeps
    digest_rule: int = _DIGEST_RULE  # of model_digest

    def fields(self) -> dict[str, Value]:
        """Return the fields as JSON has them, without those of `_LEFT_OUT` that hold nothing."""
        fields = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {name: value for name, value in fields.items() if value or name not in _LEFT_OUT}

    def digest(self) -> str:
        """Return the SHA-256 of the fields, hexadecimal."""
        return digest_of(self.fields())

    def is_of_other_rule(self, stored: Mapping[str, Value]) -> bool:
        """Whether the model's digest in the stored fields of a contract was made by another rule than this one's."""
        return stored.get("digest_rule") != self.digest_rule

    def difference(
        self, other: "Contract | Mapping[str, Value]", names: tuple[str, str] = ("this", "the other")
    ) -> list[str]:
        """Return the fields that differ, one line each in words; `other` may be the stored fields of a contract."""
        mine = self.fields()
        theirs = other.fields() if isinstance(other, Contract) else dict(other)
        lines = []
        if self.is_of_other_rule(theirs):
            age = "another" if "digest_rule" in theirs else "an older"
            lines = [
                f"model digest: {names[1]} is of {age} version of this project, which looked at other parts of the "
                "weights, so that it can't be told whether the models are the same"
            ]
            theirs |= {name: mine[name] for name in ("model_digest", "digest_rule")}
        return lines + [
            f"{name.replace('_', ' ')}: {names[0]} has {_shown(mine, name)}, {names[1]} {_shown(theirs, name)}"
            for name in [*mine, *(name for name in theirs if name not in mine)]
            if mine.get(name) != theirs.get(name)
        ]


def contract_of(cfg: RunConfig) -> Contract:
    """Return the contract of a run. Reads the model folder; raises ContractError or TokenizerError."""
    tok = tokenizer(cfg.model.path)
    return Contract(
        model_digest=_model_digest(Path(cfg.model.path)),
        tokenizer_digest=tokenizer_digest(Path(cfg.model.path)),
        template_digest=digest_of([tok.get_chat_template(), cfg.data.suffix]),
        temperature=cfg.sampling.temperature,
        top_p=cfg.sampling.top_p,
        max_prompt_tokens=cfg.data.max_prompt_tokens,
        max_response_tokens=cfg.sampling.max_response_tokens,
        stop_token_ids=stop_token_ids(cfg.model.path),
        reward=rewards.version(cfg.reward.name),
        date=cfg.data.date if chat.names_the_day(cfg.model.path) else None,
        kept_token_ids=chat.kept_token_ids(cfg.model.path),
    )


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a value as JSON has it, hexadecimal; the order of keys makes no difference."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _model_digest(folder: Path) -> str:
    """Return a digest of config.json and of every tensor's name, type, shape and three blocks of 1 KiB.

    The same for the same tensors in one file or in several. The blocks are a tensor's first, middle and last: what
    changes most of a tensor's numbers, as training or the merging of an adapter does, is seen, in a single tensor too.
    A change of a few numbers elsewhere goes unseen, of some tokens' embeddings say. Costs 25 us of a core a tensor and
    about two seeks of the disk: half a second for 20,000 tensors that are in memory.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ContractError(f"model.path: no *.safetensors in {folder}; save the model with safe_serialization=True")
    try:
        config = hashlib.sha256((folder / "config.json").read_bytes()).digest()
        with ThreadPoolExecutor(_THREADS) as threads:
            tensors = sorted(chain.from_iterable(threads.map(_tensor_digests, files)))
    except OSError as error:
        raise ContractError(f"model.path: can't read {folder}: {error}; check the folder and its rights") from error
    return hashlib.sha256(b"".join([config, *tensors])).hexdigest()


def _tensor_digests(path: Path) -> list[bytes]:
    """One a tensor of a safetensors file: of its name, type, shape and blocks."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = 8 + int.from_bytes(file.read(8), "little")
        try:
            tensors = json.loads(file.read(start - 8) if start <= size else b"")
            tensors.pop("__metadata__", None)
            return [_tensor_digest(file.fileno(), name, tensor, start, size) for name, tensor in tensors.items()]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ContractError(
                f"{path}: not a whole safetensors file ({size} bytes): {error}; copy the model again"
            ) from error


def _tensor_digest(file: int, name: str, tensor: Mapping[str, Any], start: int, size: int) -> bytes:
    """Of a tensor in an open file of `size` bytes, whose weights begin at byte `start`."""
    begin, end = (start + offset for offset in tensor["data_offsets"])
    if not start <= begin <= end <= size:
        raise ValueError(f"{name} is at bytes {begin} to {end}")
    last = max(begin, end - _BLOCK_BYTES)
    digest = hashlib.sha256(json.dumps([name, tensor["dtype"], tensor["shape"]]).encode())
    for place in (begin, (begin + last) // 2, last):
        digest.update(os.pread(file, min(_BLOCK_BYTES, end - begin), place))
    return digest.digest()


def tokenizer_digest(folder: Path) -> str:
    """Return a digest of the tokenizer's files in a model folder, all of which exports get.

    Raises TokenizerError without one, ModelFolderError for a link to nothing.
    """
    digest = hashlib.sha256()
    names = tokenizer_files(folder)
    if not names:
        raise TokenizerError(f"model.path: no tokenizer file in {folder}; add the model's tokenizer.json")
    for name in names:
        data = (folder / name).read_bytes()
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def described(fields: Mapping[str, Value]) -> list[tuple[str, str]]:
    """Return the stored fields of a contract with their names, in words."""
    return [(name.replace("_", " "), _shown(fields, name)) for name in fields]


def _shown(fields: Mapping[str, Value], name: str) -> str:
    value = fields.get(name, "none")
    if isinstance(value, list) and len(value) > _MOST_SHOWN:
        return f"{len(value)} of digest {hashlib.sha256(str(value).encode()).hexdigest()[:12]}..."
    return value[:12] + "..." if isinstance(value, str) and name.endswith("_digest") else str(value)
