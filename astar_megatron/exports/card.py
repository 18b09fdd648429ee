"""The model card of an export, its README.md: made of conversion.json and of the run's evaluations, by huggingface_hub.

It says of which step its scores are, so it is true at any time, and is written again when there is more to say. One
that somebody has changed by hand is left as it is.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from astar_megatron.config import EXPORT_FOLDER
from astar_megatron.data.files import write_atomic
from astar_megatron.exports.provenance import ORIGIN, TRAINING, Training, recorded_licence
from astar_megatron.run import certificate, scores
from astar_megatron.run.scores import Evaluation, Scored, markdown
from conversion import folders

_DATA = ("data.path", "reward.name")  # settings that have their own lines
_PAPER_ADDRESS = "https://arxiv.org/abs/"


def write(folder: Path, training: Training | None, run_dir: Path | None) -> str:
    """Write the card of an export, and `training` into its conversion.json; return in words what was done.

    `run_dir` is the run's, whose evaluations the card shows. Raises ValueError for damaged ones, and StorageError.
    """
    if training is None:
        record = folders.read_record(folder) or {}
    else:
        record = folders.add_to_record(folder, {TRAINING: dataclasses.asdict(training)})
    path = folder / folders.CARD
    if path.exists() and not folders.is_sealed(path):
        return f"{path} was changed by hand and is left as it is: remove it to have it written again"
    scored = scores.scores_of(run_dir, training.step, scores.weights_digest(record)) if run_dir and training else []
    write_atomic(path, folders.sealed(text_of(record, training, scored)).encode())
    is_runs_own = run_dir is not None and folder.resolve() == (run_dir / EXPORT_FOLDER).resolve()
    return f"{path} describes the model" + ("; `astar eval` adds scores" if is_runs_own and not scored else "")


def text_of(record: Mapping[str, Any], training: Training | None, scored: Sequence[Scored]) -> str:
    """Return the card of an export with this conversion.json: YAML of the hub's, and sections."""
    about = (
        _of_training(training, scored)
        if training
        else [f"# A conversion of {_plain(record.get(ORIGIN, record.get('source')))}\n"]
    )
    return "\n".join([f"---\n{_metadata(record, training, scored).to_yaml()}\n---\n", *about, *_certificate(record)])


def _metadata(record: Mapping[str, Any], training: Training | None, scored: Sequence[Scored]) -> ModelCardData:
    usual: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if training is None:
        usual |= recorded_licence(record)
        return ModelCardData(**usual, tags=["astar-megatron"])
    own = scored[-1].evaluations if _are_of_these(training, scored) else []
    if results := [_result(evaluation) for evaluation in own]:
        usual |= {"model_name": f"{training.base}, {training.title}", "eval_results": results}
    if _is_name_of_the_hub(training.base):
        usual["base_model"] = training.base
    tags = ["reinforcement-learning", training.method, "astar-megatron"]
    usual |= training.licence
    return ModelCardData(**usual, tags=tags)


def _result(evaluation: Evaluation) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=evaluation.name,
        dataset_config=evaluation.key,  # else the hub takes all files of one type for one
        dataset_name=evaluation.title,
        metric_type=evaluation.reward,
        metric_name="mean reward of greedy responses, per cent",
        metric_value=round(100 * evaluation.greedy.mean, 2),
    )


def _is_name_of_the_hub(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name  # ORG/NAME: a folder's name alone would be a link to nowhere


def _are_of_these(training: Training, scored: Sequence[Scored]) -> bool:
    """Whether the last evaluations are of the weights that the card is of."""
    return bool(scored) and scored[-1].step == training.step


def _of_training(training: Training, scored: Sequence[Scored]) -> Iterator[str]:
    """The sections on how the model was trained."""
    settings, title = training.settings, _plain(training.title)
    yield f"# {_plain(training.base)}, trained with {title}\n"
    link = f"[{training.paper}]({_PAPER_ADDRESS}{training.paper.removeprefix('arXiv ')})" if training.paper else ""
    yield f"## Method\n\n{', '.join(filter(None, [title, link, _code(f'objective.name: {training.method}')]))}\n"
    yield "## Data\n"
    yield f"- Prompts: {_code(settings.get('data.path'))}"
    yield f"- Reward: {_code(settings.get('reward.name'))}\n"
    yield "## Settings\n\nThose of method and sampling, and others that differ from the defaults:\n"
    yield "| key | value |\n| --- | --- |"
    for key, value in settings.items():
        if key not in _DATA:
            yield _row(key, value)
    for each in training.earlier:
        yield f"\nUntil step {each['until']} others:\n\n| key | value |\n| --- | --- |"
        yield from (_row(key, value) for key, value in each["settings"].items())
    yield "\n## Scores\n"
    yield from _scores(training, scored)
    yield "## How it was made\n"
    yield from _made(training)


def _row(key: str, value: Any) -> str:
    cells = (_code(text).replace("|", r"\|") for text in (key, json.dumps(value, ensure_ascii=False)))  # | ends a cell
    return f"| {' | '.join(cells)} |"


def _code(text: object) -> str:
    """A text as it stands, on one line: a record from elsewhere may hold what would end the code."""
    words = re.sub(r"[\r\n]", " ", str(text))
    longest = max(map(len, re.findall("`+", words)), default=0)
    fence, blank = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{blank}{words}{blank}{fence}"


def _plain(text: object) -> str:
    """A text on one line, in which nothing is markup."""
    return re.sub(r"([\\`*<>\[\]!&|])", r"\\\1", " ".join(str(text).split()))


def _scores(training: Training, scored: Sequence[Scored]) -> Iterator[str]:
    if not _are_of_these(training, scored):
        yield f"None are recorded of these weights, those after {training.step} steps.\n"
    for each in scored:
        whose = " (these weights)" if each.step == training.step else ""
        yield f"After {each.step} steps{whose}:\n\n{markdown(each.evaluations)}"


def _made(training: Training) -> Iterator[str]:
    yield f"- {training.step} steps from {_code(training.base)}"
    if training.response_tokens is not None:
        yield f"- {training.response_tokens:,} response tokens, with those of stage 1 if the method reads it"
    if training.flops:
        yield f"- {training.flops:.3g} FLOPs of the model, in training and in generation, without stage 1"
    yield f"- Software: {_plain(', '.join(f'{name} {version}' for name, version in training.versions.items()))}\n"


def _certificate(record: Mapping[str, Any]) -> Iterator[str]:
    """The section on what proves that the files hold what was trained, and that it means the same there."""
    logprobs = record.get("logprobs") or {"reason": "nothing is recorded"}
    yield "## Certificate\n"
    if reason := logprobs.get("reason"):
        yield f"Log-probs beside Megatron's: {certificate.without_words(reason)}.\n"
    else:
        yield (
            f"Megatron and {logprobs['against']} gave {logprobs['tokens']} tokens of fixed sequences log-probs that "
            f"differ by at most {logprobs['max_difference']:.1e} nats (limit {logprobs['limit']:g}).\n"
        )
    if digest := scores.weights_digest(record):
        yield (
            f"`{folders.RECORD}` has a digest of each tensor in {record.get('dtype')}, by which these files were "
            f"compared with what they were made from. SHA-256 of them all: `{digest}`.\n"
        )
