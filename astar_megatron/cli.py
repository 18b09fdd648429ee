"""astar: the command line. Each command names a program that is imported only when it runs, so help needs no torch."""

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from astar_megatron import config
from astar_megatron.cluster.errors import ClusterError
from conversion.plan import WeightMismatch

app = typer.Typer(
    help="A*PO on Megatron-Core with vLLM rollouts.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
)
convert = typer.Typer(help="Move weights between formats.", no_args_is_help=True)
app.add_typer(convert, name="convert")

Config = Annotated[Path, typer.Option("--config", help="YAML file; configs/ has some.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="key=value, for example optim.lr=1e-6; repeatable.")]


@app.command()
def sweep(config_file: Config, overrides: Overrides = None) -> None:
    """Stage 1: sample the reference, reward it, fill the V* table. Resumable."""
    _program("sweep").main(config.load(config_file, overrides or ()))


@app.command()
def train(config_file: Config, overrides: Overrides = None) -> None:
    """Stage 2: on-policy A*PO from the V* table. Run again to continue."""
    _program("train").main(config.load(config_file, overrides or ()))


@app.command(name="eval")
def evaluate(
    config_file: Config,
    model: Annotated[str | None, typer.Option(help="Hugging Face folder; default: the run's export.")] = None,
    overrides: Overrides = None,
) -> None:
    """Greedy evaluation of the run's export or another folder."""
    _program("evaluate").main(config.load(config_file, overrides or ()), model)


@convert.command(name="megatron-to-hf")
def megatron_to_hf(
    config_file: Config,
    destination: Annotated[Path, typer.Argument(help="Folder to write, in Hugging Face's format.")],
    overrides: Overrides = None,
) -> None:
    """Write the newest checkpoint of a run as a Hugging Face folder."""
    _program("export").main(config.load(config_file, overrides or ()), destination)


@app.command()
def doctor(
    config_file: Annotated[Path | None, typer.Option("--config", help="A run to check against this machine.")] = None,
    overrides: Overrides = None,
) -> None:
    """Say what this machine has and lacks, and what to do about it; with --config also whether that run fits it."""
    status = _program("doctor").main()
    if config_file is not None:
        _program("run").say_fit(config.load(config_file, overrides or ()))
    raise typer.Exit(status)


def _program(name: str) -> Any:
    return importlib.import_module(f"astar_megatron.{name}")


def main() -> None:
    """Run the command line; what a user can mend ends as one message and exit status 2, without a traceback."""
    try:
        app()
    except (ValueError, OSError) as error:
        print(f"astar: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (ClusterError, WeightMismatch) as error:
        print(f"astar: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
