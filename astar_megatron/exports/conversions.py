"""A conversion between folders of models as a program carries it out: shown, written, compared, described by a card."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from astar_megatron.cluster.placement import counted
from astar_megatron.exports import card
from astar_megatron.exports.link_table import links, size_text
from astar_megatron.exports.provenance import Training, of_conversion, run_dir_of
from astar_megatron.run.certificate import certify_conversion
from astar_megatron.run.tracking import Screen
from conversion import folders, rewrite
from conversion.ends import End, MegatronEnd, configured_dtype, open_end
from conversion.ledger import check_record
from conversion.tiles import ParallelLayout


def to_hf(source: str, destination: str, *, like: str | None, dry_run: bool) -> None:
    """Write `source`, of either kind, as a Hugging Face folder with a card of what `source` says of its training."""
    end = opened(source, destination, like, dry_run)
    parts = 2 * len(rewrite.hf_parts(end.model, end.dtype))  # written, and read back
    carry_out(end, None, destination, parts, dry_run, lambda it: rewrite.write_hf(end, destination, it))
    if not dry_run:
        written = Path(destination)
        Screen().say(card.write(written, Training.of_folder(written), run_dir_of(end.path)))


def opened(source: str, destination: str, like: str | None, dry_run: bool) -> End:
    """Return the folder `source`, once nothing is known that would keep it from being written to `destination`."""
    folders.check_destination(destination)
    folders.check_apart(destination, source)
    folders.free_bytes(destination)
    end = open_end(source, like, plan_only=dry_run)
    check_record(end)  # by a dry run too
    return end


def carry_out(
    end: End,
    layout: ParallelLayout | None,
    destination: str,
    parts: int,
    dry_run: bool,
    write: Callable[[Callable[[int], None]], None],
) -> None:
    """Show what a conversion does and, but for a dry run, `write` it and compare what both formats compute.

    Its conversion.json goes on to say what is known of the source: `provenance.of_conversion`.
    """
    screen, origin = Screen(), of_conversion(end.path)
    preview = rewrite.preview(end, layout)
    padded = end.notes().get("vocabulary")
    padding = [("vocabulary", f"{end.model.vocab_size:,} rows, {padded}: the rest is left out")] if padded else []
    allowance = "" if layout is None else f" (with {rewrite.CHUNK_BYTES // 1024} KiB a part for its archive and index)"
    rows = [
        ("from", f"{end.path} ({end.kind}, {end.model.architecture}, {_stored(end)})"),
        ("to", destination),
        ("parameters", f"{preview.parameters:,}, {size_text(preview.num_bytes)}, in {preview.copies:,} copies"),
        ("reads", f"{size_text(sum(preview.reads.values()))} from {counted(len(preview.reads), 'file')}"),
        (
            "disk",
            f"{size_text(preview.written_bytes)} needed{allowance}, {size_text(folders.free_bytes(destination))} free",
        ),
        *padding,
        *links(preview.reads, preview.links),
        ("memory at most", f"{size_text(preview.peak_bytes)} beside the process itself"),
    ]
    screen.table("what this conversion does" if dry_run else "conversion", rows)
    if not dry_run:
        # Parts are moved side by side, so one thread each.
        with _torch_threads(1), screen.progress("writing", parts) as advance:
            write(advance)
        folders.add_to_record(Path(destination), origin)
        if (end.kind == MegatronEnd.kind) == (layout is None):  # else both are of one kind: see the digests
            screen.say(certify_conversion(end, Path(destination)))


def _stored(end: End) -> str:
    """The type of the weights, and what config.json says where it is another: the weights keep theirs."""
    stored, configured = type_name(end.dtype), configured_dtype(end.model)
    return stored if configured in (stored, None) else f"{stored}, while config.json says {configured}"


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def type_name(dtype: torch.dtype) -> str:
    """Return the name of a type as config.json has it."""
    return str(dtype).removeprefix("torch.")
