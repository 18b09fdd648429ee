"""PROGRAM: model folders from one format into another, compared, and described; needs neither Ray nor engines."""

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from astar_megatron import resources
from astar_megatron.certificate import MAX_WEIGHT_BYTES, certify
from astar_megatron.model.backend import FLOAT32_ENVIRONMENT
from astar_megatron.tracking import progress, show_table
from conversion import convert, folders
from conversion.ends import End, MegatronEnd, open_end
from conversion.folders import CheckpointError
from conversion.ledger import check_record, config_said, listed, said
from conversion.tiles import ParallelLayout

_LINKS_SHOWN = 16  # more are summed up


def to_megatron(source: str, destination: str, layout: ParallelLayout, *, like: str | None, dry_run: bool) -> None:
    """Write `source`, of either kind, as a distributed checkpoint of Megatron, cut for ranks of `layout`."""
    end = _opened(source, destination, like, dry_run)
    parts = sum(len(cut) for cut in convert.chunks(end.model, layout, end.dtype).values())
    parts += len(convert.hf_parts(end.model, end.dtype))  # which are read back
    _run(end, layout, destination, parts, dry_run, lambda it: convert.write_megatron(end, destination, layout, it))


def to_hf(source: str, destination: str, *, like: str | None, dry_run: bool) -> None:
    """Write `source`, of either kind, as a Hugging Face folder."""
    end = _opened(source, destination, like, dry_run)
    parts = 2 * len(convert.hf_parts(end.model, end.dtype))  # written, and read back
    _run(end, None, destination, parts, dry_run, lambda it: convert.write_hf(end, destination, it))


def verify(a: str, b: str, *, like: str | None) -> None:
    """Compare two folders of any kind. Raises MismatchError naming the first parameter and row that differ."""
    console = Console(highlight=False)
    one, other = open_end(a, like), open_end(b, like)
    with progress(console, "comparing parameters", len(one.model.parameters())) as advance:
        convert.compare(one, other, advance)
    console.print(f"{a} and {b} hold the same {one.model.num_parameters():,} parameters", markup=False, soft_wrap=True)


def inspect(path: str, *, like: str | None) -> None:
    """Say what a folder holds; then read it, and say which parameters hold NaN or Inf, or are not as recorded."""
    console = Console(highlight=False)
    end = open_end(path, like)
    model, dims, notes = end.model, end.model.dims, end.notes()
    rows = [
        ("kind", f"{end.kind}, {_size(sum(file.stat().st_size for file in end.path.rglob('*') if file.is_file()))}"),
        ("architecture", f"{model.architecture}, {'tied' if model.tied else 'untied'} head"),
        ("parameters", f"{model.num_parameters():,} in {_name(end.dtype)}"),
        ("layers, hidden, feed-forward", f"{dims.num_layers}, {dims.hidden_size}, {dims.intermediate_size}"),
        ("heads, key-value heads, head size", f"{dims.num_heads}, {dims.num_kv_heads}, {dims.head_dim}"),
        ("vocabulary", ", ".join(filter(None, [f"{dims.vocab_size:,}", notes.pop("vocabulary", "")]))),
    ]
    if dims.num_experts:
        rows.append(("experts", f"{dims.num_experts}, {dims.experts_per_token} a token"))
    rows += [*notes.items()]
    try:
        record = folders.read_record(end.path) or {}
        rows += [(f"{folders.RECORD}: {key}", _shown(value)) for key, value in record.items()]
    except CheckpointError as error:  # the weights can be sound all the same
        rows.append((folders.RECORD, str(error)))
    show_table(console, path, rows)
    with progress(console, "reading all weights", len(convert.hf_parts(model, end.dtype))) as advance:
        ledger = convert.read_through(end, advance)
    finite = listed(ledger.bad) if ledger.bad else "all weights are finite"
    for line in dict.fromkeys((finite, said(end, ledger.digests()), config_said(end))):
        console.print(line, markup=False, soft_wrap=True)


def _opened(source: str, destination: str, like: str | None, dry_run: bool) -> End:
    folders.check_destination(destination)
    folders.check_apart(destination, source)
    folders.free_bytes(destination)
    end = open_end(source, like, plan_only=dry_run)
    check_record(end)  # by a dry run too
    return end


def _run(
    end: End,
    layout: ParallelLayout | None,
    destination: str,
    parts: int,
    dry_run: bool,
    write: Callable[[Callable[[int], None]], None],
) -> None:
    console = Console(highlight=False)
    found = convert.preview(end, layout)
    allowance = "" if layout is None else f" (with {convert.CHUNK_BYTES // 1024} KiB a part for its archive and index)"
    rows = [
        ("from", f"{end.path} ({end.kind}, {end.model.architecture}, {_name(end.dtype)})"),
        ("to", destination),
        ("parameters", f"{found.parameters:,}, {_size(found.num_bytes)}, in {found.copies:,} copies"),
        ("reads", f"{_size(sum(found.reads.values()))} from {_files(len(found.reads))}"),
        ("disk", f"{_size(found.written_bytes)} needed{allowance}, {_size(folders.free_bytes(destination))} free"),
        *_links(found.reads, found.links),
        ("memory at most", f"{_size(found.peak_bytes)} beside the process itself"),
    ]
    show_table(console, "what this conversion does" if dry_run else "conversion", rows)
    if not dry_run:
        # Parts are moved side by side, so one thread each.
        with _torch_threads(1), progress(console, "writing", parts) as advance:
            write(advance)
        if (end.kind == MegatronEnd.kind) == (layout is None):  # else both are of one kind: see the digests
            console.print(_certified(end, Path(destination)), markup=False, soft_wrap=True)


def _certified(source: End, destination: Path) -> str:
    """Compare what Megatron computes from one of the folders with transformers on the other; returns that in words.

    In float32 whatever the weights are stored in, so that a small error shows.
    """
    from_megatron = source.kind == MegatronEnd.kind
    megatron, hugging_face = (source.path, destination) if from_megatron else (destination, source.path)

    def logprobs(sequences: Sequence[Sequence[int]], _prompt_tokens: Sequence[int]) -> list[list[float]]:
        variables = [f"{name}={value}" for name, value in FLOAT32_ENVIRONMENT.items()]
        program = [sys.executable, "-P", "-m", "astar_megatron.model.alone"]
        command = ["env", *variables, *program, str(megatron), str(hugging_face)]
        done = subprocess.run(command, input=json.dumps(sequences), capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines()[-1:] or [f"its process ended with {done.returncode}"]
            raise ValueError(said[0])
        return json.loads(done.stdout.splitlines()[-1])

    most = min(MAX_WEIGHT_BYTES, resources.available_memory_bytes() // 2)
    return certify(hugging_face, logprobs, record_in=destination, dtype="float32", max_weight_bytes=most)


def _links(reads: dict[str, int], links: dict[tuple[str, str], int]) -> Iterable[tuple[str, str]]:
    """Who gives how much to whom: each link, or of many the least and the most that an end gives or gets."""
    if len(links) <= _LINKS_SHOWN:
        in_order = sorted(links.items(), key=lambda link: [_numbered(name) for name in link[0]])
        return [(f"{source} -> {target}", _size(size)) for (source, target), size in in_order]
    gets: Counter[str] = Counter()
    for (_, target), size in links.items():
        gets[target] += size
    ends = f"{len(gets)} ranks" if all(name.startswith("rank ") for name in gets) else _files(len(gets))
    return [
        (f"each of {_files(len(reads))} gives", _range(reads.values())),
        (f"each of {ends} gets", _range(gets.values())),
        ("a link", f"{_range(links.values())}, {len(links):,} of them"),
    ]


def _numbered(name: str) -> list[int | str]:
    """A name's place in an order where rank 2 is before rank 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _range(sizes: Collection[int]) -> str:
    return " to ".join(dict.fromkeys((_size(min(sizes)), _size(max(sizes)))))


def _files(count: int) -> str:
    return f"{count} file{'s' if count > 1 else ''}"


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _shown(value: object) -> str:
    if isinstance(value, dict):
        entries = ", ".join(f"{key} {entry}" for key, entry in value.items())
        return entries if len(value) <= _LINKS_SHOWN else f"{len(value)} of them"
    return str(value)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(num_bytes: int) -> str:
    for unit, size, digits in (("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 1)):
        if num_bytes >= size:
            return f"{num_bytes / size:.{digits}f} {unit}"
    return f"{num_bytes} bytes"
