"""Where rows of prompts come from, files of this machine or the hub, and what they must not overwrite."""

from pathlib import Path

from astar_megatron.data.rows import Problems, PromptError, Row, hub_rows, read_rows


def rows_of(kind: str, source: str, subset: str | None, split: str, problems: Problems) -> list[Row]:
    """The rows of a file or folder of this machine; of the hub otherwise."""
    if Path(source).exists() or kind == "jsonl":
        return read_rows(source, problems)
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or Path(source).suffix in (".jsonl", ".parquet"):
        raise PromptError(f"{source}: no such file or folder, and no name of the hub (owner/name)")
    return hub_rows(source, subset, split)


def refuse_other(key: str, path: Path, data: bytes) -> None:
    """Raise PromptError where the file of configuration key or option `key` holds other prompts than `data`."""
    if path.is_dir():
        raise PromptError(f"{key}: {str(path)!r} is a folder; name a file in it")
    if path.exists() and path.read_bytes() != data:
        raise PromptError(f"{key}: {path} is there with other prompts; remove it or choose another path")
