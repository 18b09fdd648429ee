"""What may be told of how a model was trained, wherever it goes: no path of a machine, no secret, no account.

It stands in conversion.json, under `training`, and model cards are made of it. Files and folders are named without
where they lie; keys that change no result, and those of other methods, are left out.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypedDict

import yaml
from huggingface_hub import ModelCard
from pydantic import TypeAdapter, ValidationError

from astar_megatron import config
from astar_megatron.algorithm.methods import PAPERS
from astar_megatron.run import machine
from astar_megatron.run.bundle import values_without_secrets
from astar_megatron.run.checkpoints import CHECKPOINTS_FOLDER
from astar_megatron.run.spending import Cost
from astar_megatron.run.tracking import read_metrics
from conversion.folders import PROGRESS_FILE, model_name, read_record

TRAINING, LICENCE, ORIGIN = "training", "licence", "origin"  # of conversion.json
# Keys and sections that change no result, and what says where something lies.
_NOT_TOLD = (
    *("run_dir", "sweep.table", "eval.folder", "model.path"),
    *config.NO_RESULTS,
)
# Keys that are told as defaults too, beside the method's own: whoever reads them does not know the defaults.
_ALWAYS_TOLD = ("sampling.", "train.batch_size", "optim.lr")
_FILES = ("data.path", "data.eval_path")
_TEXTS = ("data.suffix",)  # part of the prompt, word for word: a slash in it makes it no path
_LICENCE = ("license", "license_name", "license_link")  # of a card of the hub's


class Earlier(TypedDict):
    """Values that settings had before a step."""

    until: int
    settings: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How a model was trained. `settings` are those of method and sampling, and those that differ from their defaults.

    `earlier` are the values that some had before: {"until": 6, "settings": {"optim.lr": 0.001}}.
    """

    base: str  # the model that training started from, by its folder's name or the hub's
    method: str
    step: int
    settings: dict[str, Any]
    licence: dict[str, str]  # what the base's own card says: license, license_name, license_link
    response_tokens: int | None  # of stage 1 too, where the method reads it; None: not known, as flops
    flops: float | None  # of the model, in training and in generation; stage 1's are recorded nowhere
    versions: dict[str, str]
    earlier: list[Earlier]

    @classmethod
    def of_run(
        cls,
        settings: Mapping[str, Any],
        step: int,
        run_dir: Path | None,
        earlier: Sequence[Mapping[str, Any]] = (),
    ) -> Self:
        """Return what a run with these settings, one value a key path, has trained after `step` steps.

        `earlier` is as Checkpoints.earlier_settings has it. Raises ValueError for damaged metrics in `run_dir`.
        """
        lines = [line for line in read_metrics(run_dir) if line["step"] < step] if run_dir else []
        is_whole = len(lines) == step > 0
        model_path, method = str(settings["model.path"]), str(settings["objective.name"])
        told: dict[str, Any] = {
            "base": model_name(Path(model_path)),
            "settings": _told(settings, method),
            "earlier": [
                {"until": each["until"], "settings": values}
                for each in earlier
                if (values := _told(each["settings"], method, defaults=True))
            ],
            "licence": licence_of(Path(model_path)),
        }
        return cls(
            **values_without_secrets(told),
            method=method,
            step=step,
            response_tokens=lines[-1].get("spent_tokens") if is_whole else None,
            flops=sum(Cost.of_step(line).flops for line in lines) if is_whole else None,
            versions=machine.versions(),
        )

    @classmethod
    def of_folder(cls, folder: Path) -> Self | None:
        """Return what a run's checkpoint, or an export, says of its training; None where it says nothing.

        Raises ValueError for damaged files.
        """
        if not (folder / PROGRESS_FILE).is_file():
            return cls._recorded((read_record(folder) or {}).get(TRAINING))
        try:
            progress = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
            settings, step = progress.get("settings", {}), progress.get("step")
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{folder / PROGRESS_FILE}: missing or damaged ({error})") from error
        own = {"model.path", "objective.name"}
        if not isinstance(settings, dict) or not own <= settings.keys() or not isinstance(step, int):
            return None  # another program's
        return cls.of_run(settings, step, run_dir_of(folder), progress.get("earlier", []))

    @classmethod
    def _recorded(cls, fields: object) -> Self | None:
        """What a conversion.json says of the training; None for what no program here writes."""
        names = {field.name for field in dataclasses.fields(cls)}
        try:
            training = TypeAdapter(cls).validate_json(json.dumps(fields), strict=True)
        except ValidationError:
            return None
        is_own = isinstance(fields, dict) and fields.keys() == names
        return dataclasses.replace(training, licence=_licence(training.licence)) if is_own else None

    @property
    def title(self) -> str:
        """The method's name in writing."""
        return PAPERS[self.method][0] if self.method in PAPERS else self.method

    @property
    def paper(self) -> str:
        """Where the method was described; "" for one that is not this project's."""
        return PAPERS[self.method][1] if self.method in PAPERS else ""


def of_conversion(source: Path) -> dict[str, Any]:
    """Return what conversion.json of a folder made of `source` says of its origin: its training, or else its licence,
    and the first folder's name where `source` is a conversion itself.

    Raises ValueError for damaged files.
    """
    if (training := Training.of_folder(source)) is not None:
        return {TRAINING: dataclasses.asdict(training)}
    record = read_record(source) or {}
    is_conversion = "source_kind" in record  # else an export by ranks, whose `source` is the model before training
    origin = {ORIGIN: record.get(ORIGIN, record.get("source"))} if is_conversion else {}
    licence = licence_of(source)
    return origin | ({LICENCE: licence} if licence else {})


def run_dir_of(checkpoint: Path) -> Path | None:
    """Return the folder of the run that a checkpoint lies in; None for one that was moved."""
    folder = checkpoint.resolve().parent
    return folder.parent if folder.name == CHECKPOINTS_FOLDER else None


def _told(settings: Mapping[str, Any], method: str, *, defaults: bool = False) -> dict[str, Any]:
    """The settings that may be told: the method's and sampling's, and which are not the defaults, or these too."""
    others = tuple(f"{name}." for name in PAPERS if name != method)
    always = (f"{method}.", *_ALWAYS_TOLD, *(("sweep.num_samples",) if config.method_of(settings).reads_table else ()))
    told = {}
    for key, value in settings.items():
        if not key.startswith((*_NOT_TOLD, *others)):
            value = list(value) if isinstance(value, tuple) else value
            if defaults or value != config.default(key) or key.startswith(always):
                told[key] = _as_told(key, value)
    return told


def _as_told(key: str, value: Any) -> Any:
    if key in _TEXTS:
        return value
    return Path(value).name if key in _FILES and isinstance(value, str) else _without_places(value)


def _without_places(value: Any) -> Any:
    """The value, of a path its last name only; keys that no version here knows may hold one too."""
    if isinstance(value, list):
        return [_without_places(each) for each in value]
    return Path(value).name if isinstance(value, str) and re.fullmatch(r"\S*/\S*|~\S*", value) else value


def licence_of(folder: Path) -> dict[str, str]:
    """Return what a model's own card, or else its conversion.json, says of its licence; nothing if neither can be read.

    The fields are the hub's: license, license_name, license_link.
    """
    card = folder / "README.md"
    try:
        if not card.is_file():
            return recorded_licence(read_record(folder) or {})
        data = ModelCard.load(card, ignore_metadata_errors=True).data
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError, RecursionError):
        return {}
    return _licence({name: getattr(data, name, None) for name in _LICENCE})


def recorded_licence(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the licence that a conversion.json names, which is a conversion's alone; nothing if it names none."""
    fields = record.get(LICENCE)
    return _licence(fields) if isinstance(fields, dict) else {}


def _licence(fields: Mapping[str, Any]) -> dict[str, str]:
    told = {name: fields[name] for name in _LICENCE if isinstance(fields.get(name), str) and len(fields[name]) < 200}
    if not told.get("license_link", "https://").startswith("https://"):  # a file beside that card, which is not here
        del told["license_link"]
    return told
