"""What the tables of commands share: options of several commands, and how a program is imported when it runs."""

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer

Config = Annotated[Path, typer.Option("--config", help="YAML file; configs/ has some.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="key=value, for example optim.lr=1e-6; repeatable.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, write nothing.")]


def import_program(name: str) -> Any:
    """The module `astar_megatron.<name>`, imported only now, so that help needs no torch."""
    return importlib.import_module(f"astar_megatron.{name}")
