"""Weights & Biases, TensorBoard and MLflow, each behind the same three calls: open, log, close.

An entry is a step's line of metrics with every number under a path (`seconds/total`), and beside it distributions and
tables. Each library gets what it has a place for:

    wandb        values, histograms, tables; curves by step, rewards and scores by the tokens spent
    tensorboard  values, histograms, tables as text
    mlflow       values as metrics (avg@4 as avg_at_4), tables as JSON, the configuration as parameters and as JSON

What a library writes by itself lies in the run's folder, or where its address says. Leaves out when a step is logged,
and what happens where a call fails: dashboards.py.
"""

import importlib
import json
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from astar_megatron.config import TrackingConfig
from astar_megatron.data.files import without_nan
from astar_megatron.data.run_folder import step_name
from astar_megatron.data.table_text import markdown_table

CLOSE_SECONDS = 5.0  # of waiting for what is still on its way; a run that a signal ends has 10 for all that it ends
_ANSWER_SECONDS = 30.0  # in which W&B must have begun the run
_SPENT_BEFORE = "spent_tokens_before"  # in W&B: the tokens before the step, which its evaluation's weights have cost
_MODULES = {"wandb": "wandb", "tensorboard": "torch.utils.tensorboard", "mlflow": "mlflow"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of text, numbers and null under named columns."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[Any, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What there is to show of a step; or, `is_final`, of the weights after that many steps, the last."""

    step: int
    is_final: bool = False
    values: Mapping[str, float]
    histograms: Mapping[str, Sequence[float]] = field(default_factory=dict)  # finite, not empty
    tables: Mapping[str, Table] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """A run: its name, its configuration without secrets, and the folder for what libraries write."""

    name: str
    settings: Mapping[str, Any]
    folder: Path


class Library(Protocol):
    """All calls come from one thread. Any error means that it can't go on."""

    name: str  # its key, and its extra
    rewinds: bool  # whether steps that are taken again replace what was logged of them

    def open(self, about: About, run_id: str | None, first: int) -> tuple[str, str]:
        """Begin, or go on with the run of that id, whose next entry is of step `first`; return its id, and where it is.

        The second is for the person who started the run.
        """
        ...

    def log(self, entry: Entry) -> None: ...

    def close(self, *, failed: bool) -> None: ...


def libraries_of(cfg: TrackingConfig) -> list[Library]:
    """Return those that a run asks for."""
    libraries: list[Library] = []
    if cfg.wandb is not None:
        libraries.append(Wandb(cfg.wandb, offline=cfg.wandb_mode == "offline"))
    if cfg.tensorboard:
        libraries.append(TensorBoard())
    if cfg.mlflow is not None:
        libraries.append(MLflow(cfg.mlflow))
    return libraries


def check(cfg: TrackingConfig) -> None:
    """Raise ValueError where a library that is asked for is not installed, or W&B has no login to upload with."""
    for library in libraries_of(cfg):
        try:
            module = _module(library.name)
        except ImportError as error:
            raise ValueError(
                f"tracking.{library.name}: its library can't be imported ({error}); install "
                f"astar-megatron[{library.name}], or leave the key out"
            ) from None
        if library.name == "wandb" and cfg.wandb_mode == "online" and not module.login(prompt=False, verify=False):
            raise ValueError(
                "tracking.wandb: no login of W&B here; run `wandb login` or set WANDB_API_KEY, or set "
                "tracking.wandb_mode=offline and upload later with `wandb sync`"
            )


class Wandb:
    """A run of a project, `project` or `entity/project`, that goes on under its id.

    Each start writes a folder; `wandb sync` joins offline ones by the id.
    """

    name, rewinds = "wandb", False

    def __init__(self, project: str, *, offline: bool) -> None:
        entity, _, self._project = project.rpartition("/")
        self._entity, self._offline = entity or None, offline

    def open(self, about: About, run_id: str | None, first: int) -> tuple[str, str]:
        """See Library."""
        self._library = _module("wandb")
        run_id = run_id or uuid.uuid4().hex
        self._run = self._library.init(
            entity=self._entity,
            project=self._project,
            name=about.name,
            id=run_id,
            config=dict(about.settings),
            allow_val_change=True,  # a run may go on with other settings
            dir=about.folder,
            mode="offline" if self._offline else "online",
            resume="allow",  # offline too: `wandb sync` then puts a folder's lines behind those that it has
            reinit="create_new",  # not the run of whoever calls us
            settings=self._library.Settings(
                console="off",  # it would take over the output that progress is drawn on
                disable_git=True,  # the address of a remote may hold a token
                disable_code=True,
                x_disable_meta=True,  # the command line may hold one too
                init_timeout=_ANSWER_SECONDS,
                finish_timeout=CLOSE_SECONDS,
                quiet=True,
            ),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        for name, axis in (("reward_mean", "spent_tokens"), ("eval/*", _SPENT_BEFORE)):
            self._run.define_metric(axis)
            self._run.define_metric(name, step_metric=axis)
        where = f"in {self._run.dir}; `wandb sync` uploads it" if self._offline else str(self._run.url)
        return run_id, where

    def log(self, entry: Entry) -> None:
        """See Library."""
        shown: dict[str, Any] = dict(entry.values)
        if not entry.is_final:
            shown[_SPENT_BEFORE] = shown["spent_tokens"] - shown["response_tokens"]
        shown |= {name: self._library.Histogram(list(values)) for name, values in entry.histograms.items()}
        shown |= {
            name: self._library.Table(columns=list(table.columns), data=[list(row) for row in table.rows])
            for name, table in entry.tables.items()
        }
        if entry.is_final:
            self._run.summary.update(shown)
        else:
            self._run.log(shown, step=entry.step)

    def close(self, *, failed: bool) -> None:
        """See Library."""
        self._run.finish(exit_code=int(failed))


class TensorBoard:
    """Events in a folder of their own, which `tensorboard --logdir` finds below the run's."""

    name, rewinds = "tensorboard", True

    def open(self, about: About, run_id: str | None, first: int) -> tuple[str, str]:
        """See Library."""
        folder = about.folder / "tensorboard"
        purged = first if run_id else None
        self._writer = _module("tensorboard").SummaryWriter(str(folder), purge_step=purged)
        self._writer.add_text("configuration", f"```\n{json.dumps(about.settings, indent=1)}\n```", first)
        return about.name, f"in {folder}"

    def log(self, entry: Entry) -> None:
        """See Library."""
        for name, value in entry.values.items():
            self._writer.add_scalar(name, value, entry.step)
        for name, values in entry.histograms.items():
            self._writer.add_histogram(name, np.asarray(values), entry.step)
        for name, table in entry.tables.items():
            self._writer.add_text(name, markdown_table(table.columns, table.rows), entry.step)
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        """See Library."""
        self._writer.close()


class MLflow:
    """A run at an address; its experiment is MLflow's own choice (MLFLOW_EXPERIMENT_NAME, else Default)."""

    name, rewinds = "mlflow", False

    def __init__(self, address: str) -> None:
        self._address = address

    def open(self, about: About, run_id: str | None, first: int) -> tuple[str, str]:
        """See Library."""
        self._library = _module("mlflow")
        self._library.set_tracking_uri(self._address)
        run = self._library.start_run(run_id=run_id, run_name=about.name, log_system_metrics=False)
        settings = {path: json.dumps(value) for path, value in _leaves(about.settings)}
        settings = {path: text for path, text in settings.items() if path not in run.data.params}  # MLflow keeps those
        self._library.log_params(settings)
        self._library.log_dict(dict(about.settings), "config.json")
        return run.info.run_id, f"run {run.info.run_id} at {self._address}"

    def log(self, entry: Entry) -> None:
        """See Library."""
        self._library.log_metrics({mlflow_name(name): value for name, value in entry.values.items()}, step=entry.step)
        for name, table in entry.tables.items():
            rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
            self._library.log_dict(without_nan({"rows": rows}), f"{name}/{step_name(entry.step)}.json")

    def close(self, *, failed: bool) -> None:
        """See Library."""
        self._library.end_run("FAILED" if failed else "FINISHED")


def mlflow_name(name: str) -> str:
    """Return a metric's name with what MLflow refuses in one taken out: `avg@4` becomes `avg_at_4`."""
    return re.sub(r"[^\w./ -]", "_", name.replace("@", "_at_"))


def _module(name: str) -> Any:
    """Return the library's module. Raises ImportError.

    Its reports on how it is used stay off, unless the environment asks for them.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    return importlib.import_module(_MODULES[name])


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Every key path with its value."""
    leaves = []
    for name, value in settings.items():
        inner = isinstance(value, Mapping)
        leaves += _leaves(value, f"{prefix}{name}.") if inner else [(prefix + name, value)]
    return leaves
