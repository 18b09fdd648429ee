"""PROGRAM: model folders from one format into another, compared, and described; needs neither Ray nor engines."""

from astar_megatron.exports import conversions
from astar_megatron.exports.link_table import LINKS_SHOWN, size_text
from astar_megatron.run.tracking import Screen
from conversion import folders, rewrite, torch_dist
from conversion.ends import open_end
from conversion.folders import ModelFolderError
from conversion.ledger import config_verdict, listed, weights_verdict
from conversion.tiles import ParallelLayout


def to_megatron(source: str, destination: str, layout: ParallelLayout, *, like: str | None, dry_run: bool) -> None:
    """Write `source`, of either kind, as a distributed checkpoint of Megatron, cut for ranks of `layout`."""
    end = conversions.opened(source, destination, like, dry_run)
    parts = sum(len(cut) for cut in rewrite.chunks(end.model, layout, end.dtype).values())
    parts += len(rewrite.hf_parts(end.model, end.dtype))  # which are read back

    def write(advance: rewrite.Advance) -> None:
        rewrite.write_megatron(end, destination, layout, advance)

    conversions.carry_out(end, layout, destination, parts, dry_run, write)


def to_hf(source: str, destination: str, *, like: str | None, dry_run: bool) -> None:
    """Write `source`, of either kind, as a Hugging Face folder with a model card."""
    conversions.to_hf(source, destination, like=like, dry_run=dry_run)


def verify(a: str, b: str, *, like: str | None) -> None:
    """Compare two folders of any kind. Raises MismatchError naming the first parameter and row that differ."""
    screen = Screen()
    megatron = [path for path in (a, b) if torch_dist.is_checkpoint(path)] or [a]  # whose --like is
    first, second = (open_end(path, like if path in megatron else None) for path in (a, b))
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
        ("parameters", f"{model.num_parameters():,} in {conversions.type_name(end.dtype)}"),
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


def _shown(value: object) -> str:
    if isinstance(value, dict):
        entries = ", ".join(f"{key} {entry}" for key, entry in value.items())
        return entries if len(value) <= LINKS_SHOWN else f"{len(value)} of them"
    return str(value)
