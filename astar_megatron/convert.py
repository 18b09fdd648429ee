"""PROGRAM: model folders from one format into another, compared, and described; needs neither Ray nor engines."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from astar_megatron.run.certificate import certify_conversion
from astar_megatron.run.link_table import LINKS_SHOWN, files_text, links, size_text
from astar_megatron.run.tracking import Screen
from conversion import folders, rewrite
from conversion.ends import End, MegatronEnd, open_end
from conversion.folders import ModelFolderError
from conversion.ledger import check_record, config_verdict, listed, weights_verdict
from conversion.tiles import ParallelLayout


def to_megatron(source: str, destination: str, layout: ParallelLayout, *, like: str | None, dry_run: bool) -> None:
    """Write `source`, of either kind, as a distributed checkpoint of Megatron, cut for ranks of `layout`."""
    end = _opened(source, destination, like, dry_run)
    parts = sum(len(cut) for cut in rewrite.chunks(end.model, layout, end.dtype).values())
    parts += len(rewrite.hf_parts(end.model, end.dtype))  # which are read back
    _run(end, layout, destination, parts, dry_run, lambda it: rewrite.write_megatron(end, destination, layout, it))


def to_hf(source: str, destination: str, *, like: str | None, dry_run: bool) -> None:
    """Write `source`, of either kind, as a Hugging Face folder."""
    end = _opened(source, destination, like, dry_run)
    parts = 2 * len(rewrite.hf_parts(end.model, end.dtype))  # written, and read back
    _run(end, None, destination, parts, dry_run, lambda it: rewrite.write_hf(end, destination, it))


def verify(a: str, b: str, *, like: str | None) -> None:
    """Compare two folders of any kind. Raises MismatchError naming the first parameter and row that differ."""
    screen = Screen()
    first, second = open_end(a, like), open_end(b, like)
    with screen.progress("comparing parameters", len(first.model.parameters())) as advance:
        rewrite.compare(first, second, advance)
    screen.say(f"{a} and {b} hold the same {first.model.num_parameters():,} parameters")


def inspect(path: str, *, like: str | None) -> None:
    """Say what a folder holds; then read it, and say which parameters hold NaN or Inf, or are not as recorded."""
    screen = Screen()
    end = open_end(path, like)
    model, dims, notes = end.model, end.model.dims, end.notes()
    rows = [
        (
            "kind",
            f"{end.kind}, {size_text(sum(file.stat().st_size for file in end.path.rglob('*') if file.is_file()))}",
        ),
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
    except ModelFolderError as error:  # the weights can be sound all the same
        rows.append((folders.RECORD, str(error)))
    screen.table(path, rows)
    with screen.progress("reading all weights", len(rewrite.hf_parts(model, end.dtype))) as advance:
        ledger = rewrite.read_through(end, advance)
    finite = listed(ledger.bad) if ledger.bad else "all weights are finite"
    for line in dict.fromkeys((finite, weights_verdict(end, ledger.digests()), config_verdict(end))):
        screen.say(line)


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
    screen = Screen()
    preview = rewrite.preview(end, layout)
    allowance = "" if layout is None else f" (with {rewrite.CHUNK_BYTES // 1024} KiB a part for its archive and index)"
    rows = [
        ("from", f"{end.path} ({end.kind}, {end.model.architecture}, {_name(end.dtype)})"),
        ("to", destination),
        ("parameters", f"{preview.parameters:,}, {size_text(preview.num_bytes)}, in {preview.copies:,} copies"),
        ("reads", f"{size_text(sum(preview.reads.values()))} from {files_text(len(preview.reads))}"),
        (
            "disk",
            f"{size_text(preview.written_bytes)} needed{allowance}, {size_text(folders.free_bytes(destination))} free",
        ),
        *links(preview.reads, preview.links),
        ("memory at most", f"{size_text(preview.peak_bytes)} beside the process itself"),
    ]
    screen.table("what this conversion does" if dry_run else "conversion", rows)
    if not dry_run:
        # Parts are moved side by side, so one thread each.
        with _torch_threads(1), screen.progress("writing", parts) as advance:
            write(advance)
        if (end.kind == MegatronEnd.kind) == (layout is None):  # else both are of one kind: see the digests
            screen.say(certify_conversion(end, Path(destination)))


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shown(value: object) -> str:
    if isinstance(value, dict):
        entries = ", ".join(f"{key} {entry}" for key, entry in value.items())
        return entries if len(value) <= LINKS_SHOWN else f"{len(value)} of them"
    return str(value)
