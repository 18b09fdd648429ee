"""PROGRAM: model folders from one format into another, compared, and described; needs neither Ray nor engines."""

from collections.abc import Callable

from rich.console import Console

from astar_megatron.tracking import progress, show_table
from conversion import convert, folders
from conversion.ends import End, open_end
from conversion.tiles import ParallelLayout


def to_megatron(source: str, destination: str, layout: ParallelLayout, *, like: str | None, dry_run: bool) -> None:
    """Write `source`, of either kind, as a distributed checkpoint of Megatron, cut for ranks of `layout`."""
    end = _opened(source, destination, like)
    parts = sum(len(cut) for cut in convert.chunks(end.model, layout).values())
    _run(
        end,
        layout,
        destination,
        parts,
        dry_run,
        lambda advance: convert.write_megatron(end, destination, layout, advance),
    )


def to_hf(source: str, destination: str, *, like: str | None, dry_run: bool) -> None:
    """Write `source`, of either kind, as a Hugging Face folder."""
    end = _opened(source, destination, like)
    parts = len(end.model.parameters())
    _run(
        end, ParallelLayout(), destination, parts, dry_run, lambda advance: convert.write_hf(end, destination, advance)
    )


def verify(a: str, b: str, *, like: str | None) -> None:
    """Compare two folders of any kind. Raises MismatchError naming the first parameter and row that differ."""
    console = Console(highlight=False)
    one, other = open_end(a, like), open_end(b, like)
    with progress(console, "comparing parameters", len(one.model.parameters())) as advance:
        convert.compare(one, other, advance)
    console.print(f"{a} and {b} hold the same {one.model.num_parameters():,} parameters", markup=False, soft_wrap=True)


def inspect(path: str, *, like: str | None) -> None:
    """Say what a folder holds."""
    end = open_end(path, like)
    model, dims = end.model, end.model.dims
    rows = [
        ("kind", f"{end.kind}, {_size(sum(file.stat().st_size for file in end.path.rglob('*') if file.is_file()))}"),
        ("architecture", f"{model.architecture}, {'tied' if model.tied else 'untied'} head"),
        ("parameters", f"{model.num_parameters():,} in {str(end.dtype).removeprefix('torch.')}"),
        ("layers, hidden, feed-forward", f"{dims.num_layers}, {dims.hidden_size}, {dims.intermediate_size}"),
        ("heads, key-value heads, head size", f"{dims.num_heads}, {dims.num_kv_heads}, {dims.head_dim}"),
        ("vocabulary", f"{dims.vocab_size:,}{end.vocabulary_note()}"),
    ]
    if (end.path / folders.RECORD).is_file():
        rows.append(("written by", (end.path / folders.RECORD).read_text(encoding="utf-8").strip()))
    show_table(Console(highlight=False), path, rows)


def _opened(source: str, destination: str, like: str | None) -> End:
    folders.check_destination(destination)
    return open_end(source, like)


def _run(
    end: End,
    layout: ParallelLayout,
    destination: str,
    parts: int,
    dry_run: bool,
    write: Callable[[Callable[[int], None]], None],
) -> None:
    console = Console(highlight=False)
    found = convert.preview(end, layout)
    rows = [
        ("from", f"{end.path} ({end.kind}, {end.model.architecture}, {str(end.dtype).removeprefix('torch.')})"),
        ("to", destination),
        ("parameters", f"{found.parameters:,}, {_size(found.num_bytes)}, in {found.copies} copies"),
        ("a rank of the layout holds", " to ".join(sorted({_size(size) for size in found.rank_bytes}))),
        ("memory at most", f"{_size(found.peak_bytes)} beside the process itself"),
    ]
    show_table(console, "what this conversion does" if dry_run else "conversion", rows)
    if not dry_run:
        with progress(console, "writing", parts) as advance:
            write(advance)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
