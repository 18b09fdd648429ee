"""RunConfig: every key of a run, with its default, meaning, [unit] and cross-checks.

configs/README.md is made of this file; the text below a key is its only home (tests/config_page.py).
One YAML file (with at most one `base:` file below it) plus `key=value` overrides give one RunConfig. Unknown keys,
wrong types and impossible combinations are refused here, before anything starts. Leaves out: what only a running
machine knows (memory, GPUs, what a model folder holds) - resources.py and model/ check that.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from astar_megatron.config_file import ConfigError, Name, Seconds, Section, day, explain, nearest_divisor, read
from astar_megatron.config_file import as_json as as_json
from astar_megatron.config_file import with_values as with_values
from astar_megatron.config_machine import (
    CheckpointConfig,
    ClusterConfig,
    ConversionConfig,
    ParallelConfig,
    RolloutConfig,
)
from astar_megatron.config_machine import Graphs as Graphs
from astar_megatron.config_machine import Offload as Offload
from astar_megatron.config_machine import Recompute as Recompute
from astar_megatron.config_machine import SuperviseConfig as SuperviseConfig
from astar_megatron.config_machine import host_and_port as host_and_port
from astar_megatron.config_methods import (
    AstarConfig,
    GrpoConfig,
    Method,
    OaplConfig,
    ObjectiveConfig,
    PpoConfig,
    RebelConfig,
    SpoConfig,
)
from astar_megatron.config_methods import Clipped as Clipped
from astar_megatron.config_methods import MethodName as MethodName
from astar_megatron.config_slurm import STAGES as STAGES
from astar_megatron.config_slurm import SlurmConfig as SlurmConfig
from astar_megatron.config_slurm import Stage as Stage
from astar_megatron.config_slurm import without_gpus as without_gpus
from astar_megatron.config_training import BudgetConfig, OptimConfig, TrainConfig
from astar_megatron.config_training import TrackingConfig as TrackingConfig

EXPORT_FOLDER = "hf"  # in a run_dir
# Keys, and beginnings of keys, that change no number of a run.
NO_RESULTS = (
    *("cluster.", "supervise.", "checkpoint.", "tracking."),
    *("train.grace_seconds", "train.micro_batch_tokens", "train.profile_steps", "rollout.heartbeat_seconds"),
)
_IMPORTANCE_CAP = 2.0  # of A*PO, where engines draw ahead
Day = Annotated[str, BeforeValidator(day)]
type Dtype = Literal["auto", "bfloat16", "float32"]


class ModelConfig(Section):
    """The model that training starts from, and the frozen reference: one Hugging Face folder."""

    path: Name
    """Hugging Face folder with safetensors and a chat template."""
    dtype: Dtype = "auto"
    """Compute type; master weights are always float32. `auto` is bfloat16 where the hardware multiplies it."""
    fp8: Literal["tensorwise", "blockwise", "mxfp8"] | None = None
    """FP8 recipe of Transformer Engine's linear layers; null: none."""
    reference: Literal["resident", "offload"] = "resident"
    """Where the reference's weights lie. `offload`, on a GPU: in host memory but while they score."""

    @model_validator(mode="after")
    def _types(self) -> Self:
        if self.fp8 and self.dtype == "float32":
            raise ValueError(f"model.fp8: {self.fp8} goes with bfloat16, not float32; set model.dtype=bfloat16")
        return self


class DataConfig(Section):
    """The prompts of training and evaluation; `astar data` makes such files."""

    path: Name
    """JSONL or Parquet file: a question and an answer a row."""
    prompt_field: str = "question"
    """Name of the question's field."""
    answer_field: str = "answer"
    """Name of the answer's field."""
    suffix: str = ""
    """Appended to each question."""
    max_prompt_tokens: int = Field(default=256, ge=1)
    """[tokens] The longest prompt, chat template included."""
    long_prompts: Literal["refuse", "drop"] = "refuse"
    """What is done with longer prompts; none is ever cut."""
    eval_path: Name | None = None
    """File of the evaluation's prompts; null: those of `data.path`."""
    date: Day | None = None
    """The day, as 2026-11-28, for a chat template that asks for it; it never gets the clock's."""


class RewardConfig(Section):
    """One rule for stage 1, training and evaluation.

    A response whose reward raises, takes too long or is no number from -1 to 1 is a failure: evaluation counts it as 0,
    training as the lowest reward of its step and at most 0, stage 1 as the lowest of its prompt and at most 0.
    """

    name: str
    """A named reward, or `package.module:function` of your own."""
    timeout_seconds: Seconds = 10.0
    """[seconds] For one response; a process that takes longer is killed and replaced."""
    memory_gib: float = Field(default=4.0, gt=0.0)
    """[GiB] Memory that each process of a reward may write to; PyTorch takes one."""
    max_failures: int = Field(default=100, ge=0)
    """[responses] Lines that `<run_dir>/reward_failures.jsonl` may have; one more stops the run."""


class SamplingConfig(Section):
    """How responses are drawn, the same in both stages."""

    temperature: float = Field(default=1.0, ge=0.01)  # vLLM would raise a lower one to 0.01 in silence
    """Divides the logits."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """[probability] Drawn are the likeliest tokens that together have at least this; below 1 for `astar eval` alone."""
    max_response_tokens: int = Field(default=1024, ge=1)
    """[tokens] A longer response is ended there, and scored as it stands."""


class SweepConfig(Section):
    """Stage 1: where the rewards of the reference's samples are kept, and how many a prompt."""

    table: Name | None = None
    """Folder of the V* table; null: `<run_dir>/v_star`."""
    num_samples: int = Field(default=8, ge=1, le=100_000)
    """[responses] Samples a prompt."""
    extra_tokens: int = Field(default=0, ge=0)
    """[tokens] Budget of response tokens for more samples where V*'s interval is widest."""
    text: bool = False
    """Keep the responses' text beside their tokens."""


class FilterConfig(Section):
    """In which share of the epochs training takes prompts of three kinds, by what stage 1 says. 1: all, 0: none."""

    all_wrong: float = Field(default=1.0, ge=0.0, le=1.0)
    """[share of epochs] Prompts of which no sample got 1; what is given for the right form alone does not count."""
    all_right: float = Field(default=1.0, ge=0.0, le=1.0)
    """[share of epochs] Prompts of which no sample got less than 1."""
    wide: float = Field(default=1.0, ge=0.0, le=1.0)
    """[share of epochs] Prompts whose V* has a 95 % interval wider than `filter.max_width`."""
    max_width: float = Field(default=1.0, gt=0.0)
    """[reward] The widest interval that `filter.wide` leaves alone."""

    @property
    def leaves_out(self) -> bool:
        """Whether some prompts may come in fewer epochs than others."""
        return min(self.all_wrong, self.all_right, self.wide) < 1


class EvalConfig(Section):
    """Evaluation, with the engines of training: the run's own prompts under its reward, or named benchmarks."""

    interval: int | None = Field(default=None, ge=1)
    """[steps] Between evaluations in training, with one more at its end; null: no evaluation."""
    benchmarks: list[Name] = Field(default=[])
    """Names of benchmarks; empty: `data.eval_path`, or `data.path` without one."""
    folder: Name | None = None
    """Where the benchmarks' files are."""
    num_samples: int | None = Field(default=None, ge=0, le=100_000)
    """[responses] Samples a problem, beside the greedy one; null: 32 for amc23, 0 for all others."""
    max_prompts: int | None = Field(default=None, ge=1)
    """[problems] How many of each set, from its beginning; null: all."""


class RunConfig(Section):
    """What a run is called and where it writes."""

    run_dir: Name
    """Folder of metrics, checkpoints, the V* table and the export."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of sampling, of the order of prompts and of dithered weights."""
    model: ModelConfig
    data: DataConfig
    reward: RewardConfig
    sampling: SamplingConfig = SamplingConfig()
    sweep: SweepConfig = SweepConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    astar: AstarConfig = AstarConfig()
    oapl: OaplConfig = OaplConfig()
    grpo: GrpoConfig = GrpoConfig()
    rebel: RebelConfig = RebelConfig()
    ppo: PpoConfig = PpoConfig()
    spo: SpoConfig = SpoConfig()
    filter: FilterConfig = FilterConfig()
    train: TrainConfig = TrainConfig()
    budget: BudgetConfig = BudgetConfig()
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    rollout: RolloutConfig = RolloutConfig()
    conversion: ConversionConfig = ConversionConfig()
    cluster: ClusterConfig = ClusterConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    tracking: TrackingConfig = TrackingConfig()
    supervise: SuperviseConfig = SuperviseConfig()
    slurm: SlurmConfig = SlurmConfig()

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        mini = self.mini_batch_size
        if self.train.batch_size % mini:
            raise ValueError(
                f"train.mini_batch_size: {mini} does not divide train.batch_size {self.train.batch_size}; "
                f"take a divisor, for example {nearest_divisor(self.train.batch_size, mini)}"
            )
        if mini % self.parallel.data:
            raise ValueError(
                f"parallel.data: {self.parallel.data} ranks can't share {mini} sequences an optimiser step evenly; "
                f"take a divisor of it, for example {nearest_divisor(mini, self.parallel.data)}"
            )
        if mini % self.group_size:
            key = ".group_size" if "group_size" in type(self.method).model_fields else ""
            raise ValueError(
                f"{self.objective.name}{key}: groups of {self.group_size} responses to a prompt don't divide the "
                f"{mini} sequences of an optimiser step; set train.batch_size and train.mini_batch_size to multiples "
                f"of {self.group_size}"
            )
        if self.rollout.max_staleness and (reason := self.method.on_policy):
            raise ValueError(
                f"rollout.max_staleness: {self.rollout.max_staleness}, but {self.objective.name} {reason}; set it to 0"
            )
        self.method.check(self.train.num_steps, self.train.batch_size)
        if self.optim.loss_scale == "pg" and not self.method.has_beta2:
            raise ValueError(
                f"optim.loss_scale: pg divides by 2 beta2, which {self.objective.name} has not; leave the key out"
            )
        needed = self.optim.warmup_steps + (self.optim.decay_steps or 0)
        if needed >= self.optimizer_steps:
            raise ValueError(
                f"optim.warmup_steps: {needed} with optim.decay_steps, which leave nothing of the "
                f"{self.optimizer_steps} optimiser steps of the run (train.num_steps * batch_size / mini_batch_size); "
                "lower them"
            )
        if self.eval.benchmarks and self.eval.folder is None:
            raise ValueError(
                f"eval.folder: needed for eval.benchmarks {', '.join(self.eval.benchmarks)}; set it to the folder of "
                "their files, for `astar eval` also by --data"
            )
        return self

    @property
    def method(self) -> Method:
        """The section of the method that trains."""
        return getattr(self, self.objective.name)

    @property
    def importance_cap(self) -> float | None:
        """That of A*PO; None: no response is weighed."""
        return self.astar.importance_cap or (_IMPORTANCE_CAP if self.rollout.max_staleness else None)

    @property
    def mini_batch_size(self) -> int:
        return self.train.mini_batch_size or self.train.batch_size

    @property
    def group_size(self) -> int:
        """Responses to a prompt, of each batch: those that the method compares with each other."""
        return self.method.num_responses

    @property
    def critic_lr(self) -> float | None:
        """The learning rate of the method's critic, if it has one."""
        return self.method.lr_of_critic

    @property
    def copies_reference(self) -> bool:
        """Whether the reference becomes a copy of the policy, which a checkpoint then holds."""
        return self.method.copies_reference

    @property
    def asks_stage_1(self) -> bool:
        """Whether the method, or the filter, takes something of the V* table."""
        return self.method.reads_table or self.filter.leaves_out

    @property
    def beta1(self) -> float:
        """Of the V* that the run reads."""
        return self.oapl.beta1 if self.objective.name == "oapl" else self.astar.beta1

    @property
    def optimizer_steps(self) -> int:
        """Of the whole run."""
        return self.train.num_steps * (self.train.batch_size // self.mini_batch_size)

    @property
    def table_dir(self) -> Path:
        return Path(self.sweep.table) if self.sweep.table else Path(self.run_dir) / "v_star"

    @property
    def export_dir(self) -> Path:
        return Path(self.run_dir) / EXPORT_FOLDER

    @property
    def max_tokens(self) -> int:
        """The longest sequence of the run, prompt and response."""
        return self.data.max_prompt_tokens + self.sampling.max_response_tokens


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the RunConfig of a YAML file and `a.b=value` overrides (values are read as YAML).

    Raises ConfigError, with the key's path and the nearest valid name.
    """
    return validate(read(path, overrides))


def validate(tree: Mapping[str, Any]) -> RunConfig:
    """Return the RunConfig of a tree of plain values; raises ConfigError listing every problem, one a line."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        lines = [explain(problem, list(keys())) for problem in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def check_drawn_whole(cfg: RunConfig) -> None:
    """Raise ConfigError where stage 1 and training would draw from a part of the policy; evaluation may."""
    if cfg.sampling.top_p < 1:
        raise ConfigError(
            f"sampling.top_p: {cfg.sampling.top_p}, but the loss is of the whole policy, as V* of the whole reference: "
            "responses that are drawn from a part of it would bias its gradient; set it to 1 for stage 1 and training. "
            "`astar eval` alone may have less"
        )


def flat(section: Section, prefix: str = "") -> dict[str, Any]:
    """Return every key path of a configuration with its value, for what is kept of a run.

    Without the section slurm: it says how a run is started, and its `env` may hold what is nobody else's.
    """
    values: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if not isinstance(value, SlurmConfig):
            values |= flat(value, f"{prefix}{name}.") if isinstance(value, Section) else {prefix + name: value}
    return values


def keys(section: type[Section] = RunConfig, prefix: str = "") -> dict[str, type[Section]]:
    """Return every key path of the configuration with the section that owns it, in file order."""
    sections: dict[str, type[Section]] = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            sections |= keys(field.annotation, f"{prefix}{name}.")
        else:
            sections[prefix + name] = section
    return sections


def default(key: str) -> Any:
    """Return the default of a key path, as JSON has it; an ellipsis for a key that has none, or is not known here."""
    section, name = keys().get(key), key.rpartition(".")[2]
    if section is None or section.model_fields[name].is_required():
        return ...
    value = section.model_fields[name].get_default(call_default_factory=True)
    return list(value) if isinstance(value, tuple) else value


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return by key path the values that settings had in a record, where they have others now.

    A key that the record lacks, of a version that did not know it, had its default.
    """
    was = {key: before.get(key, default(key)) for key in now} if before else {}
    return {key: value for key, value in was.items() if value not in (..., now[key])}


def method_of(settings: Mapping[str, Any]) -> Method:
    """Return the section of the method that settings name, one value a key path, unchecked: they may be older.

    One that is not known here is a method without keys.
    """
    name = str(settings.get("objective.name"))
    field = RunConfig.model_fields.get(name)
    kind = field.annotation if field else None
    if not (isinstance(kind, type) and issubclass(kind, Method)):
        return Method()
    prefix = f"{name}."
    return kind.model_construct(**{key[len(prefix) :]: settings[key] for key in settings if key.startswith(prefix)})
