"""astar convert: the commands that move weights between formats."""

import importlib
from typing import Annotated, Any

import typer

from astar_megatron.cli_options import DryRun, import_torch_program

convert = typer.Typer(help="Move weights between formats.", no_args_is_help=True)

Source = Annotated[str, typer.Argument(help="Folder to read.")]
Destination = Annotated[str, typer.Argument(help="Folder to write; an older export there is replaced, nothing else.")]
Like = Annotated[str | None, typer.Option(help="Hugging Face folder of the same model, if a checkpoint has no config.")]
Tensor = Annotated[int, typer.Option("--tp", help="Tensor-parallel ranks that will load it.")]
Pipeline = Annotated[int, typer.Option("--pp", help="Pipeline stages that will load it.")]
Expert = Annotated[int, typer.Option("--ep", help="Expert-parallel ranks that will load it.")]


@convert.command(name="hf-to-megatron")
def hf_to_megatron(
    source: Source,
    destination: Destination,
    tp: Tensor = 1,
    pp: Pipeline = 1,
    ep: Expert = 1,
    dry_run: DryRun = False,
) -> None:
    """Write a Hugging Face folder as a distributed checkpoint of Megatron, which any layout can load."""
    import_torch_program("convert").to_megatron(source, destination, _layout(tp, pp, ep), like=None, dry_run=dry_run)


@convert.command(name="megatron-to-hf")
def megatron_to_hf(source: Source, destination: Destination, like: Like = None, dry_run: DryRun = False) -> None:
    """Write a distributed checkpoint, of a run or of Megatron-LM, as a Hugging Face folder."""
    import_torch_program("convert").to_hf(source, destination, like=like, dry_run=dry_run)


@convert.command()
def reshape(
    source: Source,
    destination: Destination,
    tp: Tensor = 1,
    pp: Pipeline = 1,
    ep: Expert = 1,
    like: Like = None,
    dry_run: DryRun = False,
) -> None:
    """Write a distributed checkpoint's weights cut and padded for another layout."""
    import_torch_program("convert").to_megatron(source, destination, _layout(tp, pp, ep), like=like, dry_run=dry_run)


@convert.command()
def verify(
    a: Annotated[str, typer.Argument(help="A folder of either kind.")],
    b: Annotated[str, typer.Argument(help="Another.")],
    like: Like = None,
) -> None:
    """Compare the weights of two folders, number by number; names the first that differs."""
    import_torch_program("convert").verify(a, b, like=like)


@convert.command()
def inspect(path: Annotated[str, typer.Argument(help="A folder of either kind.")], like: Like = None) -> None:
    """Say what a folder holds: architecture, parameters, type, bytes, where it came from."""
    import_torch_program("convert").inspect(path, like=like)


def _layout(tensor: int, pipeline: int, expert: int) -> Any:
    tiles = importlib.import_module("conversion.tiles")
    return tiles.ParallelLayout(tensor=tensor, pipeline=pipeline, data=expert, expert=expert)
