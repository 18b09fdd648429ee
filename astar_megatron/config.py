"""RunConfig: every key of a run, with its default, unit and cross-checks.

One YAML file (with at most one `base:` file below it) plus `key=value` overrides give one RunConfig. Unknown keys,
wrong types and impossible combinations are refused here, before anything starts. Leaves out: what only a running
machine knows (memory, GPUs, what a model folder holds) - resources.py and model/ check that.
"""

import datetime
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from astar_megatron.config_file import ConfigError, read


def _day(value: Any) -> str:
    """A day as its text; YAML reads 2026-11-28 as a date."""
    try:
        text = value.isoformat() if type(value) is datetime.date else value
        return datetime.datetime.strptime(text, "%Y-%m-%d").date().isoformat()
    except (TypeError, ValueError):
        raise ValueError(f"data.date: expected a day as 2026-11-28, got {value!r}") from None


Name = Annotated[str, Field(min_length=1)]
Day = Annotated[str, BeforeValidator(_day)]
type Recompute = Literal["none", "selective", "full"]
type Dtype = Literal["auto", "bfloat16", "float32"]
type Graphs = Literal["none", "decode", "compiled"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The Hugging Face folder that the policy starts from, which is also the frozen reference."""

    path: Name
    dtype: Dtype = "auto"  # compute type; master weights are always fp32. auto: bfloat16 where the hardware has it
    fp8: Literal["tensorwise", "blockwise", "mxfp8"] | None = None  # recipe of Transformer Engine's linear layers
    reference: Literal["resident", "offload"] = "resident"  # offload, on GPU: in host memory but while it scores

    @model_validator(mode="after")
    def _types(self) -> Self:
        if self.fp8 and self.dtype == "float32":
            raise ValueError(f"model.fp8: {self.fp8} goes with bfloat16, not float32; set model.dtype=bfloat16")
        return self


class DataConfig(Section):
    """Prompts: a JSONL or Parquet file, one object a line; `astar data` makes some."""

    path: Name
    prompt_field: str = "question"
    answer_field: str = "answer"
    suffix: str = ""  # appended to the prompt's text
    max_prompt_tokens: int = Field(default=256, ge=1)
    long_prompts: Literal["refuse", "drop"] = "refuse"  # what is done with prompts over the limit; none is ever cut
    eval_path: Name | None = None  # evaluation prompts; none: those of `path`
    date: Day | None = None  # the day that a chat template which asks for the time writes; it never gets the clock's


class RewardConfig(Section):
    """ONE rule for sweep, training and evaluation: a name of algorithm/rewards or `package.module:function`.

    A response whose reward raises, takes too long or is no number from -1 to 1 is a failure: training and evaluation
    count it as 0, a V* table does not take it.
    """

    name: str
    timeout_seconds: float = Field(default=10.0, gt=0.0)  # of one response; a process that takes longer is killed
    max_failures: int = Field(default=100, ge=0)  # lines of <run_dir>/reward_failures.jsonl; one more stops the run


class SamplingConfig(Section):
    """How responses are drawn, the same in both stages."""

    temperature: float = Field(default=1.0, ge=0.01)  # vLLM would raise a lower one to 0.01 in silence
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    max_response_tokens: int = Field(default=1024, ge=1)


class SweepConfig(Section):
    """Stage 1: where the rewards of the reference's samples are kept, and how many a prompt."""

    table: Name | None = None  # folder; none: <run_dir>/v_star
    num_samples: int = Field(default=8, ge=1)
    extra_tokens: int = Field(default=0, ge=0)  # response tokens for more samples where V*'s interval is widest
    text: bool = False  # keep the responses' text beside their tokens


class AstarConfig(Section):
    """The two temperatures of A*PO: beta1 of V*, beta2 of the regression."""

    beta1: float = Field(default=0.5, gt=0.0)
    beta2: float = Field(default=1e-3, gt=0.0)
    importance_cap: float | None = Field(default=None, ge=1.0)  # weigh losses by min(cap, policy / engine); none: by 1
    # What a prompt's earlier rewards still weigh when training adds its own to V*; none: V* stays that of stage 1.
    refresh_decay: float | None = Field(default=None, gt=0.0, le=1.0)


class FilterConfig(Section):
    """The share of epochs that take a prompt of which stage 1 says this; 1: all, 0: none, 0.1: now and then again."""

    all_wrong: float = Field(default=1.0, ge=0.0, le=1.0)  # no reward of 1, whatever the part for a form
    all_right: float = Field(default=1.0, ge=0.0, le=1.0)  # no reward below 1
    wide: float = Field(default=1.0, ge=0.0, le=1.0)  # V*'s 95 % interval wider than max_width
    max_width: float = Field(default=1.0, gt=0.0)  # in units of reward


class TrainConfig(Section):
    num_steps: int = Field(default=100, ge=1)
    batch_size: int = Field(default=256, ge=1)  # prompts a step, one rollout each
    mini_batch_size: int | None = Field(default=None, ge=1)  # sequences an optimiser step; none: batch_size
    micro_batch_tokens: int = Field(
        default=16384, ge=1
    )  # at most so many tokens a forward pass; a longer sequence goes alone
    max_skipped_steps: int = Field(default=3, ge=1)  # optimiser steps lost to NaN or Inf that end the run


class OptimConfig(Section):
    """AdamW; biases and norms do not decay. Steps here are optimiser steps, one a mini-batch.

    After `warmup_steps` of linear rise the learning rate is constant; with `cosine` it falls until the end of training,
    with `wsd` in a straight line over the last `decay_steps`. `min_lr` is where a step after the last would be.
    """

    lr: float = Field(default=1e-6, gt=0.0)
    min_lr: float = Field(default=0.0, ge=0.0)
    schedule: Literal["constant", "cosine", "wsd"] = "constant"
    adam_beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    adam_beta2: float = Field(default=0.999, ge=0.0, lt=1.0)
    adam_eps: float = Field(default=1e-8, gt=0.0)
    weight_decay: float = Field(default=0.01, ge=0.0)
    clip_grad: float = Field(default=1.0, ge=0.0)  # global norm; 0: no clipping
    warmup_steps: int = Field(default=0, ge=0)
    decay_steps: int | None = Field(default=None, ge=1)
    dither: bool = True  # bfloat16: begin each fp32 master anywhere in what rounds to its weight (model/dither.py)
    loss_scale: Literal["paper", "pg"] = "paper"  # pg: loss / (2 beta2), whose gradient is a policy gradient's
    offload: bool = False  # on GPU with Transformer Engine: states and step in host memory

    @model_validator(mode="after")
    def _schedule(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"optim.min_lr: {self.min_lr} is above optim.lr {self.lr}; lower it")
        if self.schedule == "constant" and self.min_lr:
            raise ValueError("optim.min_lr: schedule constant never falls to it; leave it out or set optim.schedule")
        if (self.schedule == "wsd") != (self.decay_steps is not None):
            raise ValueError(
                f"optim.decay_steps: schedule wsd needs it and no other has it, got {self.decay_steps} with "
                f"{self.schedule}"
            )
        return self


class ParallelConfig(Section):
    """Megatron ranks: world = tensor * pipeline * context * data.

    What needs no key: tensor > 1 is sequence parallel between the matrices, and with more than one replica
    (context * data) gradients are reduced and weights gathered while others are computed.
    """

    tensor: int = Field(default=1, ge=1)  # ranks that share each matrix
    pipeline: int = Field(default=1, ge=1)  # stages of layers
    virtual: int = Field(default=1, ge=1)  # parts of the model a stage holds, run in turn (interleaved 1F1B)
    context: int = Field(default=1, ge=1)  # ranks that share the tokens of each sequence
    data: int = Field(default=1, ge=1)  # ranks that share the sequences
    expert: int = Field(default=1, ge=1)  # of the context * data replicas, so many share the experts
    recompute: Recompute = "none"  # activations made again in the backward pass:
    # selective: of attention's core, full: of every layer

    @property
    def replicas(self) -> int:
        return self.context * self.data

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.replicas


class RolloutConfig(Section):
    """The vLLM pool: `num_engines` engines of `tensor` workers each."""

    num_engines: int = Field(default=1, ge=1)
    tensor: int = Field(default=1, ge=1)
    max_num_seqs: int = Field(default=256, ge=1)  # sequences an engine decodes at once
    kv_cache_gib: int = Field(default=1, ge=1)  # on CPU, GiB of host memory an engine
    gpu_memory_utilization: float = Field(default=0.5, gt=0.0, lt=1.0)  # on GPU, share of the device
    # decode, on GPU: a captured graph for each decode step; compiled: torch.compile too, minutes at the start. Left out
    # it is decode on GPU, none on CPU
    graphs: Graphs | None = None


class ConversionConfig(Section):
    """How weights move from the policy to the engines."""

    bucket_bytes: int = Field(default=64 << 20, ge=4096)  # a rank sends through two buckets of at most this size


class ClusterConfig(Section):
    """Ray: joined at `address`, or started locally when there is none."""

    address: Name | None = None
    threads: int | None = Field(default=None, ge=1)  # CPU threads an actor; none: shared evenly among a side's actors
    start_timeout_seconds: float = Field(default=300.0, gt=0.0)


class CheckpointConfig(Section):
    interval: int = Field(default=50, ge=1)  # steps; the last step is always saved
    keep: int = Field(default=2, ge=1)  # newest checkpoints kept


class EvalConfig(Section):
    """Evaluation with the pool of training: the run's own prompts under its reward, or named benchmarks."""

    interval: int | None = Field(default=None, ge=1)  # steps between evaluations in training, and at its end; none: no
    benchmarks: list[Name] = []  # of data/benchmarks.py; empty: data.eval_path, or data.path without one
    folder: Name | None = None  # where the benchmarks' files are
    num_samples: int | None = Field(default=None, ge=0)  # a problem, beside the greedy one; none: AMC23 32, others 0
    max_prompts: int | None = Field(default=None, ge=1)  # the first so many of each set


class RunConfig(Section):
    """Every key of a run. `run_dir` gets metrics, checkpoints, the V* table and the export."""

    run_dir: Name
    seed: int = Field(default=0, ge=0)
    model: ModelConfig
    data: DataConfig
    reward: RewardConfig
    sampling: SamplingConfig = SamplingConfig()
    sweep: SweepConfig = SweepConfig()
    astar: AstarConfig = AstarConfig()
    filter: FilterConfig = FilterConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    rollout: RolloutConfig = RolloutConfig()
    conversion: ConversionConfig = ConversionConfig()
    cluster: ClusterConfig = ClusterConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        mini = self.mini_batch_size
        if self.train.batch_size % mini:
            raise ValueError(
                f"train.mini_batch_size: {mini} does not divide train.batch_size {self.train.batch_size}; "
                f"take a divisor, for example {_nearest_divisor(self.train.batch_size, mini)}"
            )
        if mini % self.parallel.data:
            raise ValueError(
                f"parallel.data: {self.parallel.data} ranks can't share {mini} sequences an optimiser step evenly; "
                f"take a divisor of it, for example {_nearest_divisor(mini, self.parallel.data)}"
            )
        needed = self.optim.warmup_steps + (self.optim.decay_steps or 0)
        if needed >= self.optimizer_steps:
            raise ValueError(
                f"optim.warmup_steps: with optim.decay_steps {needed}, which leave nothing of the "
                f"{self.optimizer_steps} optimiser steps of the run (train.num_steps * batch_size / mini_batch_size); "
                "lower them"
            )
        if self.eval.benchmarks and self.eval.folder is None:
            raise ValueError(
                f"eval.folder: needed for eval.benchmarks {', '.join(self.eval.benchmarks)}; set it to the folder of "
                "their files"
            )
        return self

    @property
    def mini_batch_size(self) -> int:
        return self.train.mini_batch_size or self.train.batch_size

    @property
    def optimizer_steps(self) -> int:
        """Of the whole run."""
        return self.train.num_steps * (self.train.batch_size // self.mini_batch_size)

    @property
    def table_dir(self) -> Path:
        return Path(self.sweep.table) if self.sweep.table else Path(self.run_dir) / "v_star"

    @property
    def export_dir(self) -> Path:
        return Path(self.run_dir) / "hf"

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
        lines = [_explain(problem) for problem in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def keys(section: type[Section] = RunConfig, prefix: str = "") -> dict[str, type[Section]]:
    """Return every key path of the configuration with the section that owns it, in file order."""
    sections: dict[str, type[Section]] = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            sections |= keys(field.annotation, f"{prefix}{name}.")
        else:
            sections[prefix + name] = section
    return sections


def flat(section: Section, prefix: str = "") -> dict[str, Any]:
    """Return every key path of a configuration with its value."""
    values: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        values |= flat(value, f"{prefix}{name}.") if isinstance(value, Section) else {prefix + name: value}
    return values


_FORMER = {
    "conversion.verify_interval": "every publish is checked whole now; leave it out",
    "rollout.eager": "it is rollout.graphs now: true is none, false is compiled, and decode lies between them",
}


def _explain(problem: Any) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    got = f", got {problem['input']!r}" if problem["type"] not in ("missing", "value_error") else ""
    if path in _FORMER:
        return f"{path}: no such key any more; {_FORMER[path]}"
    if problem["type"] == "extra_forbidden":
        section = path.rpartition(".")[0]
        siblings = [key.rpartition(".")[2] for key in keys() if key.rpartition(".")[0] == section]
        known = f"; {section} has {', '.join(siblings)}" if section and siblings else ""
        return f"{path}: no such key; the nearest is {_nearest_key(path)}{known}"
    if problem["type"] == "missing":
        return f"{path}: this key is required"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    return f"{path}: {problem['msg'][0].lower()}{problem['msg'][1:]}{got}"


def _nearest_key(path: str) -> str:
    """Return the key most like `path`: the same name in any section, its initials (learning_rate: lr), or alike."""
    section, _, leaf = path.rpartition(".")
    leaves = {key: key.rpartition(".")[2] for key in keys()}
    initials = f"{section}.{''.join(word[:1] for word in leaf.split('_'))}"
    if initials in leaves:
        return initials
    alike = difflib.get_close_matches(leaf, leaves.values(), n=1)
    candidates = [key for key, name in leaves.items() if not alike or name == alike[0]]
    return difflib.get_close_matches(path, candidates, n=1, cutoff=0.0)[0]


def _nearest_divisor(number: int, wanted: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - wanted))
