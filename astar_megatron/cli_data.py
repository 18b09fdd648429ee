"""astar data: the commands that prepare prompts."""

from typing import Annotated

import typer

from astar_megatron import config
from astar_megatron.cli_options import Config, Overrides, import_program, import_torch_program

data = typer.Typer(help="Prepare prompts as the JSONL that data.path reads.", no_args_is_help=True)

Out = Annotated[str, typer.Option("--out", help="JSONL file to write.")]
Files = Annotated[str | None, typer.Argument(help="JSONL or Parquet file, folder of them, or a name of the hub.")]
Split = Annotated[str | None, typer.Option(help="Split of a data set of the hub, or of a folder of one; else train.")]
Subset = Annotated[str | None, typer.Option(help="Configuration of a data set of the hub, or of a folder of one.")]
QuestionField = Annotated[str, typer.Option(help="Field of the question.")]
AnswerField = Annotated[str, typer.Option(help="Field of the answer.")]
RewardName = Annotated[str | None, typer.Option("--reward", help="Refuse answers that this reward can't read.")]
Drop = Annotated[bool, typer.Option("--drop", help="Leave out rows that can't be used, instead of refusing them.")]
Rows = Annotated[int, typer.Option(min=1, max=1_000_000, help="How many to make.")]
Seed = Annotated[int, typer.Option(min=0)]


@data.command()
def gsm8k(out: Out, source: Files = None, split: Split = None, drop: Drop = False) -> None:
    """GSM8K; SOURCE defaults to the hub's openai/gsm8k."""
    import_program("dataset").prepare("gsm8k", source, out, split=split, drop=drop)


@data.command()
def math(out: Out, source: Files = None, split: Split = None, drop: Drop = False) -> None:
    """MATH; SOURCE defaults to the hub's DigitalLearningGmbH/MATH-lighteval."""
    import_program("dataset").prepare("math", source, out, split=split, drop=drop)


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
    import_program("dataset").prepare(
        "jsonl", source, out, question=question_field, answer=answer_field, reward=reward, drop=drop
    )


@data.command()
def hf(
    name: Annotated[str, typer.Argument(help="Data set of the hub, or a folder of one.")],
    out: Out,
    split: Split = None,
    subset: Subset = None,
    question_field: QuestionField = "question",
    answer_field: AnswerField = "answer",
    reward: RewardName = None,
    drop: Drop = False,
) -> None:
    """Any data set of the Hugging Face hub."""
    fields = {"question": question_field, "answer": answer_field}
    import_program("dataset").prepare("hf", name, out, split=split, subset=subset, reward=reward, drop=drop, **fields)


@data.command()
def countdown(out: Out, rows: Rows = 10_000, seed: Seed = 0) -> None:
    """Countdown problems, made from a seed; for the reward countdown."""
    import_program("dataset").generate("countdown", out, rows=rows, seed=seed)


@data.command()
def arithmetic(out: Out, rows: Rows = 10_000, seed: Seed = 0) -> None:
    """Sums and products of three numbers, made from a seed; for the reward arithmetic."""
    import_program("dataset").generate("arithmetic", out, rows=rows, seed=seed)


@data.command()
def multiply(out: Out, rows: Rows = 10_000, seed: Seed = 0) -> None:
    """Products of two numbers of three digits, made from a seed; for the reward multiply."""
    import_program("dataset").generate("multiply", out, rows=rows, seed=seed)


@data.command(name="import-stage1")
def import_stage1(
    source: Annotated[str, typer.Argument(help="Parquet file or folder, or a name of the hub.")],
    config_file: Config,
    split: Split = None,
    overrides: Overrides = None,
) -> None:
    """Published stage-1 data of A*PO: prompts to data.path, responses to the V* table of the run."""
    import_torch_program("stage1_import").import_stage1(config.load(config_file, overrides or ()), source, split)
