"""astar: the command line. Each command names a program that is imported only when it runs, so help needs no torch."""

import itertools
import json
import logging
import re
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from astar_megatron import config
from astar_megatron.cli_convert import convert
from astar_megatron.cli_data import data
from astar_megatron.cli_options import Config, DryRun, Overrides, import_program, import_torch_program
from astar_megatron.cli_start import check_start
from astar_megatron.cluster import signals
from astar_megatron.cluster.cores import unbind
from astar_megatron.cluster.errors import ActorLost, ClusterError
from astar_megatron.config_secrets import LOGIN_REFUSED, has_login, shown
from conversion.plan import WeightMismatch

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_show_locals=False,  # they may hold secrets
)
app.add_typer(convert, name="convert")
app.add_typer(data, name="data")
scale = typer.Typer(help="Scaling laws: scores against compute.", no_args_is_help=True)
app.add_typer(scale, name="scale")


def _print_version(asked: bool) -> None:
    if asked:
        versions = import_program("run.machine").versions()
        typer.echo(", ".join(f"{name} {version}" for name, version in versions.items()))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="The versions of what is here.")
    ] = False,
) -> None:
    """A*PO on Megatron-Core with vLLM rollouts."""


_UsageError: Any = typer.BadParameter.__base__  # for which typer has no name of its own


@app.command()
def sweep(
    config_file: Config,
    inspect: Annotated[
        bool, typer.Option("--inspect", help="Show and plot what the table holds, draw nothing.")
    ] = False,
    overrides: Overrides = None,
) -> None:
    """Stage 1: sample the reference, reward it, fill the V* table. Resumable; several may run at once."""
    import_torch_program("inspection" if inspect else "sweep").main(config.load(config_file, overrides or ()))


@app.command()
def train(
    config_file: Config,
    dry_run: DryRun = False,
    supervise: Annotated[bool, typer.Option("--supervise", help="Start it again when it was killed.")] = False,
    overrides: Overrides = None,
) -> None:
    """Train by the method of objective.name: A*PO from the V* table of `astar sweep`. Run again to continue.

    Where slurm.backend is sbatch or nemo-run, and this is no job, it submits as `astar launch` does.
    """
    cfg = config.load(config_file, overrides or ())
    if import_program("launch.program").submits(cfg.slurm):
        if supervise:
            raise config.ConfigError(
                f"--supervise: with slurm.backend={cfg.slurm.backend} the job's script starts it again; leave it out, "
                "or set slurm.backend=local to train here"
            )
        print(f"slurm.backend={cfg.slurm.backend}: submitting, as `astar launch` does; slurm.backend=local trains here")
        raise typer.Exit(import_program("launch.program").launch(cfg, config_file, overrides or (), dry_run=dry_run))
    if supervise and not dry_run:
        sets = [word for override in overrides or () for word in ("--set", override)]
        raise typer.Exit(import_program("supervise").main(cfg, ["train", "--config", str(config_file), *sets]))
    import_torch_program("can_start" if dry_run else "train").main(cfg)


@app.command()
def compare(
    config_file: Config,
    methods: Annotated[str, typer.Option(help="Names of objective.name, as in astar,grpo,rebel.")],
    budget: Annotated[str, typer.Option(help="Of each run, stage 1 counted: tokens=N, flops=N or seconds=N.")],
    seeds: Annotated[str, typer.Option(help="A run of each method for each of them.")] = "0,1,2",
    out: Annotated[Path | None, typer.Option(help="Folder of runs and results; default: <run_dir>/compare.")] = None,
    overrides: Overrides = None,
) -> None:
    """Train with several methods at equal cost; leaves a table, and curves with bands. Run again to continue."""
    cfg = config.load(config_file, overrides or ())
    raise typer.Exit(import_torch_program("compare").main(cfg, methods, budget, seeds, out))


@scale.command(name="run")
def run_study(
    study: Annotated[Path, typer.Argument(help="YAML file of the study; examples/SCALING.md has one.")],
) -> None:
    """Train every cell of a grid with every seed up to equal budgets, and evaluate it there. Run again to continue."""
    raise typer.Exit(import_torch_program("scaling").run(study))


@scale.command(name="fit")
def fit_laws(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="RUNS...", help="Run folders, CSV, JSONL; NAME=PATH names the curve."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs/scale-fit"),
    compute: Annotated[str | None, typer.Option(help="Column of the compute; default: the trainer's.")] = None,
    score: Annotated[str | None, typer.Option(help="Column of the score; default: the trainer's.")] = None,
    per_row: Annotated[bool, typer.Option("--per-row", help="The compute is a row's own, and is added up.")] = False,
    tolerance: Annotated[float, typer.Option(min=0.0, help="By how much a prediction may miss a later mean.")] = 0.02,
) -> None:
    """Fit a sigmoid, a power law and a constant to half of the compute, and see what they say of the rest."""
    import_program("scaling_fit").fit(sources, out, compute, score, per_row=per_row, tolerance=tolerance)


@app.command()
def show(
    run: Annotated[Path, typer.Argument(help="Folder of a run: its run_dir.")],
    out: Annotated[Path | None, typer.Option(help="HTML file to write; default: <run>/show.html.")] = None,
) -> None:
    """Write a run as one HTML page: curves, health, timeline of a step, rollouts with their tokens' log-ratios."""
    import_program("show").main(run, out)


@app.command(name="eval")
def evaluate(
    config_file: Config,
    model: Annotated[
        str | None, typer.Option(help="Hugging Face folder, or checkpoint of a run; default: the run's export.")
    ] = None,
    benchmarks: Annotated[
        str | None, typer.Option(help="gsm8k,math500,minerva,olympiadbench,amc23,aime24; default: the run's prompts.")
    ] = None,
    folder: Annotated[str | None, typer.Option("--data", help="Folder of the benchmarks' files.")] = None,
    overrides: Overrides = None,
) -> None:
    """Evaluate the run's export or another model: greedy score, and avg@n, maj@n, pass@k of samples."""
    names = [name.strip() for name in (benchmarks or "").split(",") if name.strip()]
    if benchmarks is not None and not names:
        raise config.ConfigError(
            f"--benchmarks: expected names, as gsm8k,amc23, got {benchmarks!r}; without it the run's prompts are asked"
        )
    sets = [f"eval.benchmarks={json.dumps(names, ensure_ascii=False)}"] if names else []
    sets += [f"eval.folder={json.dumps(folder, ensure_ascii=False)}"] if folder else []
    cfg = config.load(config_file, [*(overrides or ()), *sets])
    if folder is not None and not cfg.eval.benchmarks:
        raise config.ConfigError("--data: the folder of benchmarks; name them too, as --benchmarks gsm8k,amc23")
    import_torch_program("evaluate").main(cfg, model)


@app.command()
def plan(
    config_file: Config,
    gpu: Annotated[
        str | None, typer.Option(help="Kind of GPU, as H100, H200 or A100; default: none, memory on cores alone.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    overrides: Overrides = None,
) -> None:
    """Say before there is a GPU what a run will take: memory, seconds of a step, GPU hours; and what fits, if not."""
    raise typer.Exit(import_program("plan").main(config.load(config_file, overrides or ()), gpu, as_json=as_json))


@app.command()
def export(
    config_file: Config,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="Then send it to the Hugging Face hub, as HF_TOKEN's owner.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="A new repository of the hub is private.")] = False,
    overrides: Overrides = None,
) -> None:
    """Write the run's newest checkpoint to <run_dir>/hf as a Hugging Face folder, as training does at its end.

    With --push-to-hub an export of that checkpoint which is there already is sent as it is.
    """
    if private and push_to_hub is None:
        raise config.ConfigError("--private: of the hub's repository; name it, as --push-to-hub ORG/NAME")
    import_torch_program("export").main(config.load(config_file, overrides or ()), push_to_hub, private=private)


@app.command()
def launch(
    config_file: Config,
    backend: Annotated[str | None, typer.Option(help="sbatch, nemo-run or local.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes of training.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="GPUs of each node.")] = None,
    stages: Annotated[str | None, typer.Option(help="Of sweep,train,eval,export.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be submitted, change nothing.")] = False,
    overrides: Overrides = None,
) -> None:
    """Submit a run's stages as jobs, each after the one before it; the section slurm of the file says how."""
    listed = None if stages is None else f"[{stages}]"
    flags = {"backend": backend, "nodes": nodes, "gpus_per_node": gpus_per_node, "stages": listed}
    sets = [*(overrides or ()), *(f"slurm.{key}={value}" for key, value in flags.items() if value is not None)]
    cfg = config.load(config_file, sets)
    raise typer.Exit(import_program("launch.program").launch(cfg, config_file, sets, dry_run=dry_run))


@app.command()
def jobs(
    action: Annotated[str, typer.Argument(help="status, logs or cancel.")],
    config_file: Config,
    overrides: Overrides = None,
) -> None:
    """Say how the jobs of a launched run are, show the end of their logs, or cancel them."""
    import_program("launch.program").look(config.load(config_file, overrides or ()), action)


@app.command()
def doctor(
    context: typer.Context,
    config_file: Annotated[Path | None, typer.Option("--config", help="A run to check against this machine.")] = None,
    overrides: Overrides = None,
    cluster: Annotated[
        str | None, typer.Option(help="host:port of a Ray cluster whose nodes to look at, instead of this machine.")
    ] = None,
    nodes: Annotated[str, typer.Option(help="Names of the nodes that must join it, with commas; or how many.")] = "1",
    spare: Annotated[int, typer.Option(min=0, help="How many bad nodes may be left out.")] = 0,
    seconds: Annotated[float, typer.Option(min=0, help="Within which the nodes must have joined.")] = 120.0,
    file: Annotated[Path | None, typer.Option("--json", help="File for what was measured.")] = None,
    only_joined: Annotated[bool, typer.Option("--only-joined", help="Only wait for the nodes.")] = False,
    program: Annotated[str, typer.Option(help="What is to begin there: train, sweep, eval, ...")] = "train",
) -> None:
    """Say what this machine has and lacks, and what to do about it; with --config also whether that run fits it.

    With --cluster: which nodes of a Ray cluster are bad; with --config whether a command of astar suits them.
    """

    def given(**flags: str) -> str:
        sources = {flag: context.get_parameter_source(name) for name, flag in flags.items()}
        return ", ".join(flag for flag, source in sources.items() if source and source.name != "DEFAULT")

    flags = {"nodes": "--nodes", "spare": "--spare", "seconds": "--seconds", "file": "--json"}
    of_nodes = given(**flags, only_joined="--only-joined", program="--program")
    of_run = given(overrides="--set", program="--program")
    if of_nodes and cluster is None:
        raise config.ConfigError(f"{of_nodes}: of a cluster's nodes; name it, as --cluster 10.0.0.1:6379")
    if of_run and config_file is None:
        raise config.ConfigError(f"{of_run}: of a run; name its file, as --config configs/demo.yaml")
    cfg = config_file and config.load(config_file, overrides or ())
    if cluster is not None:
        planned, main = cfg and (cfg, program), import_torch_program("preflight").main
        raise typer.Exit(main(cluster, nodes, spare, seconds, file, looks=not only_joined, planned=planned))
    status = import_torch_program("doctor").main()
    if cfg is not None:
        import_torch_program("can_start").main(cfg)
    raise typer.Exit(status)


def _check_sets(arguments: list[str]) -> None:
    """Raise ConfigError where several keys follow one --set, of which the command would take the first."""
    for option, setting, more in zip(arguments, arguments[1:], arguments[2:], strict=False):
        if option == "--set" and re.match(r"\w+(\.\w+)*=", more) and not Path(more).exists():
            raise config.ConfigError(f"--set {setting} {more}: each key has its own: --set {setting} --set {more}")


def _check_logins(arguments: list[str]) -> None:
    """Raise ConfigError where a word of the command line has a login, before anything repeats it."""
    for option, word in itertools.pairwise(arguments):
        if has_login(word):
            key = re.match(r"[\w.-]+(?==)", word)  # of --set KEY=, or --option=
            name = key[0] if key else option if option.startswith("-") else "an argument"
            raise config.ConfigError(f"{name}: {LOGIN_REFUSED}")


def _words(error: Exception) -> str:
    """The message, without the number that the system has for it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _end(words: str, status: int) -> NoReturn:
    """End with a message, as `shown` has it."""
    print(f"astar: {shown(words)}", file=sys.stderr)
    raise SystemExit(status) from None


class _Shown(logging.Formatter):
    """Warnings as `shown` has them: one may quote a response."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


def main() -> None:
    """Run the command line; what a user can mend ends as one message and exit status 2, without a traceback."""
    signals.heed()
    assert logging.lastResort is not None
    logging.lastResort.setFormatter(_Shown())
    try:
        check_start()
        _check_logins(sys.argv)
        _check_sets(sys.argv)
        unbind()
        with signals.kept():
            raise SystemExit(app(standalone_mode=False))
    except _UsageError as error:  # of the parser of options, which repeats words
        error.message = shown(error.message)
        error.show()
        raise SystemExit(error.exit_code) from None
    except (ValueError, OSError) as error:
        _end(_words(error), 2)
    except ModuleNotFoundError as error:
        remedy = import_program("run.machine").remedy_without(error.name or "")
        if not remedy:
            raise
        _end(f"this needs {error.name}, which is not installed: {remedy}", 2)
    except (ClusterError, WeightMismatch) as error:
        _end(str(error), signals.LOST if isinstance(error, ActorLost) else 1)
    except RuntimeError as error:
        if not str(error).startswith("Symlink loop"):  # what Path.resolve raises before Python 3.13
            raise
        _end(f"{error}: choose another path", 2)


if __name__ == "__main__":
    main()
