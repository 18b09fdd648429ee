"""astar: the command line. Each command names a program that is imported only when it runs, so help needs no torch."""

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from astar_megatron import config
from astar_megatron.cluster import signals
from astar_megatron.cluster.errors import ActorLost, ClusterError
from conversion.plan import WeightMismatch

app = typer.Typer(
    help="A*PO on Megatron-Core with vLLM rollouts.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
)
convert = typer.Typer(help="Move weights between formats.", no_args_is_help=True)
app.add_typer(convert, name="convert")
data = typer.Typer(help="Prepare prompts as the JSONL that data.path reads.", no_args_is_help=True)
app.add_typer(data, name="data")
scale = typer.Typer(help="Scaling laws: scores against compute.", no_args_is_help=True)
app.add_typer(scale, name="scale")

Config = Annotated[Path, typer.Option("--config", help="YAML file; configs/ has some.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="key=value, for example optim.lr=1e-6; repeatable.")]

Source = Annotated[str, typer.Argument(help="Folder to read.")]
Destination = Annotated[str, typer.Argument(help="Folder to write; an older export there is replaced, nothing else.")]
Like = Annotated[str | None, typer.Option(help="Hugging Face folder of the same model, if a checkpoint has no config.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, write nothing.")]
Tensor = Annotated[int, typer.Option("--tp", help="Tensor-parallel ranks that will load it.")]
Pipeline = Annotated[int, typer.Option("--pp", help="Pipeline stages that will load it.")]
Expert = Annotated[int, typer.Option("--ep", help="Expert-parallel ranks that will load it.")]

Out = Annotated[str, typer.Option("--out", help="JSONL file to write.")]
Files = Annotated[str | None, typer.Argument(help="JSONL or Parquet file, folder of them, or a name of the hub.")]
Split = Annotated[str, typer.Option(help="Split of a data set of the hub.")]
Subset = Annotated[str | None, typer.Option(help="Configuration of a data set of the hub.")]
QuestionField = Annotated[str, typer.Option(help="Field of the question.")]
AnswerField = Annotated[str, typer.Option(help="Field of the answer.")]
RewardName = Annotated[str | None, typer.Option("--reward", help="Refuse answers that this reward can't read.")]
Drop = Annotated[bool, typer.Option("--drop", help="Leave out rows that can't be used, instead of refusing them.")]
Rows = Annotated[int, typer.Option(min=1, max=1_000_000, help="How many to make.")]
Seed = Annotated[int, typer.Option(min=0)]


@app.command()
def sweep(
    config_file: Config,
    inspect: Annotated[
        bool, typer.Option("--inspect", help="Show and plot what the table holds, draw nothing.")
    ] = False,
    overrides: Overrides = None,
) -> None:
    """Stage 1: sample the reference, reward it, fill the V* table. Resumable; several may run at once."""
    _program("inspection" if inspect else "sweep").main(config.load(config_file, overrides or ()))


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
    if _program("launch.program").submits(cfg.slurm):
        if supervise:
            raise config.ConfigError(
                f"--supervise: with slurm.backend={cfg.slurm.backend} the job's script starts it again; leave it out, "
                "or set slurm.backend=local to train here"
            )
        print(f"slurm.backend={cfg.slurm.backend}: submitting, as `astar launch` does; slurm.backend=local trains here")
        raise typer.Exit(_program("launch.program").launch(cfg, config_file, overrides or (), dry_run=dry_run))
    if supervise and not dry_run:
        sets = [word for override in overrides or () for word in ("--set", override)]
        raise typer.Exit(_program("supervise").main(cfg, ["train", "--config", str(config_file), *sets]))
    _program("fit" if dry_run else "train").main(cfg)


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
    raise typer.Exit(_program("compare").main(cfg, methods, budget, seeds, out))


@scale.command(name="run")
def run_study(
    study: Annotated[Path, typer.Argument(help="YAML file of the study; examples/SCALING.md has one.")],
) -> None:
    """Train every cell of a grid with every seed up to equal budgets, and evaluate it there. Run again to continue."""
    raise typer.Exit(_program("scaling").run(study))


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
    _program("scaling").fit(sources, out, compute, score, per_row=per_row, tolerance=tolerance)


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
    """Evaluate the run's export or another model: pass@1, and avg@n, maj@n, pass@k of samples."""
    names = [name.strip() for name in (benchmarks or "").split(",") if name.strip()]
    sets = [f"eval.benchmarks={json.dumps(names, ensure_ascii=False)}"] if names else []
    sets += [f"eval.folder={json.dumps(folder, ensure_ascii=False)}"] if folder else []
    _program("evaluate").main(config.load(config_file, [*(overrides or ()), *sets]), model)


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
    raise typer.Exit(_program("plan").main(config.load(config_file, overrides or ()), gpu, as_json=as_json))


@app.command()
def export(config_file: Config, overrides: Overrides = None) -> None:
    """Write the run's newest checkpoint to <run_dir>/hf as a Hugging Face folder, as training does at its end."""
    cfg = config.load(config_file, overrides or ())
    newest = _program("run.checkpoints").newest(Path(cfg.run_dir))
    _program("convert").to_hf(str(newest), str(cfg.export_dir), like=None, dry_run=False)


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
    flags = {"backend": backend, "nodes": nodes, "gpus_per_node": gpus_per_node, "stages": stages and f"[{stages}]"}
    sets = [*(overrides or ()), *(f"slurm.{key}={value}" for key, value in flags.items() if value is not None)]
    cfg = config.load(config_file, sets)
    raise typer.Exit(_program("launch.program").launch(cfg, config_file, sets, dry_run=dry_run))


@app.command()
def jobs(
    action: Annotated[str, typer.Argument(help="status, logs or cancel.")],
    config_file: Config,
    overrides: Overrides = None,
) -> None:
    """Say how the jobs of a launched run are, show the end of their logs, or cancel them."""
    _program("launch.program").look(config.load(config_file, overrides or ()), action)


@data.command()
def gsm8k(out: Out, source: Files = None, split: Split = "train", drop: Drop = False) -> None:
    """GSM8K; SOURCE defaults to the hub's openai/gsm8k."""
    _program("dataset").prepare("gsm8k", source, out, split=split, drop=drop)


@data.command()
def math(out: Out, source: Files = None, split: Split = "train", drop: Drop = False) -> None:
    """MATH; SOURCE defaults to the hub's DigitalLearningGmbH/MATH-lighteval."""
    _program("dataset").prepare("math", source, out, split=split, drop=drop)


@data.command()
def jsonl(
    source: Annotated[str, typer.Argument(help="JSONL or Parquet file, or folder of them.")],
    out: Out,
    question_field: QuestionField = "question",
    answer_field: AnswerField = "answer",
    reward: RewardName = None,
    drop: Drop = False,
) -> None:
    """Files of this machine."""
    _program("dataset").prepare(
        "jsonl", source, out, question=question_field, answer=answer_field, reward=reward, drop=drop
    )


@data.command()
def hf(
    name: Annotated[str, typer.Argument(help="Data set of the hub, or a folder of one.")],
    out: Out,
    split: Split = "train",
    subset: Subset = None,
    question_field: QuestionField = "question",
    answer_field: AnswerField = "answer",
    reward: RewardName = None,
    drop: Drop = False,
) -> None:
    """Any data set of the Hugging Face hub."""
    fields = {"question": question_field, "answer": answer_field}
    _program("dataset").prepare("hf", name, out, split=split, subset=subset, reward=reward, drop=drop, **fields)


@data.command()
def countdown(out: Out, rows: Rows = 10_000, seed: Seed = 0) -> None:
    """Countdown problems, made from a seed; for the reward countdown."""
    _program("dataset").generate("countdown", out, rows=rows, seed=seed)


@data.command()
def arithmetic(out: Out, rows: Rows = 10_000, seed: Seed = 0) -> None:
    """Sums and products of three numbers, made from a seed; for the reward arithmetic."""
    _program("dataset").generate("arithmetic", out, rows=rows, seed=seed)


@data.command()
def multiply(out: Out, rows: Rows = 10_000, seed: Seed = 0) -> None:
    """Products of two numbers of three digits, made from a seed; for the reward multiply."""
    _program("dataset").generate("multiply", out, rows=rows, seed=seed)


@data.command(name="import-stage1")
def import_stage1(
    source: Annotated[str, typer.Argument(help="Parquet file or folder, or a name of the hub.")],
    config_file: Config,
    split: Split = "train",
    overrides: Overrides = None,
) -> None:
    """Published stage-1 data of A*PO: prompts to data.path, responses to the V* table of the run."""
    _program("stage1_import").import_stage1(config.load(config_file, overrides or ()), source, split)


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
    _program("convert").to_megatron(source, destination, _layout(tp, pp, ep), like=None, dry_run=dry_run)


@convert.command(name="megatron-to-hf")
def megatron_to_hf(source: Source, destination: Destination, like: Like = None, dry_run: DryRun = False) -> None:
    """Write a distributed checkpoint, of a run or of Megatron-LM, as a Hugging Face folder."""
    _program("convert").to_hf(source, destination, like=like, dry_run=dry_run)


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
    _program("convert").to_megatron(source, destination, _layout(tp, pp, ep), like=like, dry_run=dry_run)


@convert.command()
def verify(
    a: Annotated[str, typer.Argument(help="A folder of either kind.")],
    b: Annotated[str, typer.Argument(help="Another.")],
    like: Like = None,
) -> None:
    """Compare the weights of two folders, number by number; names the first that differs."""
    _program("convert").verify(a, b, like=like)


@convert.command()
def inspect(path: Annotated[str, typer.Argument(help="A folder of either kind.")], like: Like = None) -> None:
    """Say what a folder holds: architecture, parameters, type, bytes, where it came from."""
    _program("convert").inspect(path, like=like)


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
    cfg = config_file and config.load(config_file, overrides or ())
    if cluster is not None:
        planned, main = cfg and (cfg, program), _program("preflight").main
        raise typer.Exit(main(cluster, nodes, spare, seconds, file, looks=not only_joined, planned=planned))
    flags = {"nodes": "--nodes", "spare": "--spare", "seconds": "--seconds", "file": "--json"}
    flags |= {"only_joined": "--only-joined", "program": "--program"}
    sources = {flag: context.get_parameter_source(name) for name, flag in flags.items()}
    if given := [flag for flag, source in sources.items() if source and source.name != "DEFAULT"]:
        raise config.ConfigError(f"{', '.join(given)}: of a cluster's nodes; name it, as --cluster 10.0.0.1:6379")
    status = _program("doctor").main()
    if cfg is not None:
        _program("fit").main(cfg)
    raise typer.Exit(status)


def _layout(tensor: int, pipeline: int, expert: int) -> Any:
    tiles = importlib.import_module("conversion.tiles")
    return tiles.ParallelLayout(tensor=tensor, pipeline=pipeline, data=expert, expert=expert)


def _program(name: str) -> Any:
    return importlib.import_module(f"astar_megatron.{name}")


def _check_sets(arguments: list[str]) -> None:
    """Raise ConfigError where several keys follow one --set, of which the command would take the first."""
    for option, setting, more in zip(arguments, arguments[1:], arguments[2:], strict=False):
        if option == "--set" and re.match(r"\w+(\.\w+)*=", more) and not Path(more).exists():
            raise config.ConfigError(f"--set {setting} {more}: each key has its own: --set {setting} --set {more}")


def _words(error: Exception) -> str:
    """The message, without the number that the system has for it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def main() -> None:
    """Run the command line; what a user can mend ends as one message and exit status 2, without a traceback."""
    signals.heed()
    try:
        _check_sets(sys.argv)
        with signals.kept():
            app()
    except (ValueError, OSError) as error:
        print(f"astar: {_words(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except ModuleNotFoundError as error:
        extras = _program("run.machine").extras_with(error.name or "")
        if not extras:
            raise
        names = " or ".join(f"astar-megatron[{extra}]" for extra in extras)
        print(f"astar: this needs {error.name}, which is not installed: install {names}", file=sys.stderr)
        raise SystemExit(2) from None
    except (ClusterError, WeightMismatch) as error:
        print(f"astar: {error}", file=sys.stderr)
        raise SystemExit(signals.LOST if isinstance(error, ActorLost) else 1) from None
    except RuntimeError as error:
        if not str(error).startswith("Symlink loop"):  # what Path.resolve raises before Python 3.13
            raise
        print(f"astar: {error}: choose another path", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
