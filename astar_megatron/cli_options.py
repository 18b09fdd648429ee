"""What the tables of commands share: options of several commands, and how a program is imported when it runs."""

import importlib
import resource
from pathlib import Path
from typing import Annotated, Any

import typer

_ADDRESS_GIB = 6  # that an engine of the smallest model maps; torch's libraries alone map 3.4

Config = Annotated[Path, typer.Option("--config", help="YAML file; configs/ has some.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="key=value, for example optim.lr=1e-6; repeatable.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, write nothing.")]


def import_program(name: str) -> Any:
    """The module `astar_megatron.<name>`, imported only now, so that help needs no torch."""
    return importlib.import_module(f"astar_megatron.{name}")


def import_torch_program(name: str) -> Any:
    """`import_program` of one that needs torch. Raises OSError where a limit of addresses would have it abort."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < _ADDRESS_GIB << 30:
        raise OSError(
            f"ulimit -v: a process may map {limit / (1 << 30):.1f} GiB, expected {_ADDRESS_GIB} GiB or more (the "
            "libraries of torch and vLLM, not memory in use); lift it (ulimit -v unlimited) here, or in the job"
        )
    return import_program(name)
