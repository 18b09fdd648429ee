"""The keys of what computes, and who watches it: ranks, engines, the weights between them, Ray, checkpoints."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from astar_megatron.config_file import Name, Seconds, Section

type Recompute = Literal["none", "selective", "full"]
type Offload = Literal["none", "cache", "optimizer", "all"]
type Graphs = Literal["none", "decode", "compiled"]


def host_and_port(value: str) -> str:
    """Return an address as it is. Raises ValueError where it is no host:port."""
    host, _, port = value.rpartition(":")
    if not host or set(host) & set("/@ \t\n") or port not in map(str, range(1, 1 << 16)):
        got = "one with a login" if "@" in value else f"{value!r:.200}"
        raise ValueError(f"cluster.address: expected host:port, for example 10.0.0.1:6379, got {got}")
    return value


Address = Annotated[Name, AfterValidator(host_and_port)]


class ParallelConfig(Section):
    """Megatron ranks of the policy: world = tensor * pipeline * context * data.

    What needs no key: with tensor > 1 the ranks share the tokens between the matrices (sequence parallelism), and with
    context * data > 1 gradients are reduced and weights gathered while others are computed.
    """

    tensor: int = Field(default=1, ge=1, le=4096)
    """[ranks] Ranks that share each matrix."""
    pipeline: int = Field(default=1, ge=1, le=4096)
    """[ranks] Stages, each with a part of the layers."""
    virtual: int = Field(default=1, ge=1, le=4096)
    """[parts] Parts of the model that a stage holds and runs in turn (interleaved 1F1B)."""
    context: int = Field(default=1, ge=1, le=4096)
    """[ranks] Ranks that share the tokens of each sequence."""
    data: int = Field(default=1, ge=1, le=4096)
    """[ranks] Ranks that share the sequences."""
    expert: int = Field(default=1, ge=1, le=4096)
    """[ranks] How many of the context * data replicas share the experts."""
    recompute: Recompute = "none"
    """What the backward pass computes again, to save memory. `selective`: attention's core; `full`: every layer."""

    @property
    def replicas(self) -> int:
        return self.context * self.data

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.replicas

    def describe(self) -> str:
        """Return the axes that are longer than one, in words."""
        axes = ("tensor", "pipeline", "virtual", "context", "data", "expert")
        return " ".join(f"{axis}={size}" for axis in axes if (size := getattr(self, axis)) > 1) or "one rank"


class RolloutConfig(Section):
    """The vLLM pool: `num_engines` engines of `tensor` workers each."""

    num_engines: int = Field(default=1, ge=1, le=4096)
    """[engines] Engines, which share the responses to draw."""
    tensor: int = Field(default=1, ge=1, le=4096)
    """[workers] Workers of an engine, which share each matrix."""
    max_num_seqs: int = Field(default=256, ge=1, le=4096)
    """[sequences] Sequences that an engine decodes at once."""
    kv_cache_gib: int = Field(default=1, ge=1)
    """[GiB] Host memory for an engine's keys and values; on a CPU only."""
    gpu_memory_utilization: float = Field(default=0.5, gt=0.0, lt=1.0)
    """[share] Part of a GPU's memory that an engine takes; on a GPU only."""
    max_staleness: int = Field(default=0, ge=0, le=1000)
    """[versions] How much older than the policy the weights may be that drew a response. Above 0 engines draw ahead."""
    update: Literal["in_flight", "drain"] = "in_flight"
    """How weights reach an engine that draws ahead: its responses freeze and go on under the new ones, or end first."""
    heartbeat_seconds: float = Field(default=60.0, ge=0.1, le=1e6)
    """[seconds] Within which a hung engine is noticed, and replaced; more than a publish or a decoding step takes.
    Weights that do not move for half of it are sent again without the engine that holds them up."""
    keep: int | None = Field(default=None, ge=0)
    """[steps] Of how many of the newest steps `<run_dir>/rollouts` holds the rollouts; null: of all."""
    graphs: Graphs | None = None
    """`decode`: captured graphs; `compiled`: torch.compile too, minutes at the start; null: `decode` if on a GPU."""


class ConversionConfig(Section):
    """How weights move from the policy to the engines."""

    bucket_bytes: int = Field(default=64 << 20, ge=4096, le=256 << 20)  # of two on a shared GPU, see run/sharing.py
    """[bytes] Size of each of the two buckets through which a rank sends."""


class ClusterConfig(Section):
    """Ray: joined at `address`, or started here when there is none."""

    address: Address | None = None
    """host:port of a Ray that runs; null: one is started on this machine."""
    share_gpus: bool | None = None
    """Whether policy ranks and engine workers are on the same GPUs; null: where there are too few for both apart."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """[threads] CPU threads of an actor; null: a side's actors share the cores evenly."""
    start_timeout_seconds: Seconds = 300.0
    """[seconds] How long the engines may take to start, and the policy."""
    call_timeout_seconds: Seconds = 3600.0
    """[seconds] How long anything else may take that ranks or engines are asked for, such as a step of training, or the
    next response to requests that an engine was given at once."""


class CheckpointConfig(Section):
    """Checkpoints of training."""

    interval: int = Field(default=50, ge=1)
    """[steps] Between checkpoints; the last step is always saved."""
    keep: int = Field(default=2, ge=1)
    """[checkpoints] How many of the newest are kept."""
    keep_every: int | None = Field(default=None, ge=1)
    """[steps] Checkpoints after a multiple of so many steps are kept for ever; null: none."""

    @model_validator(mode="after")
    def _kept_are_written(self) -> Self:
        if self.keep_every is not None and self.keep_every % self.interval:
            raise ValueError(
                f"checkpoint.keep_every: {self.keep_every} is no multiple of checkpoint.interval, {self.interval}, "
                "after which there are checkpoints to keep; make it one"
            )
        return self


class SuperviseConfig(Section):
    """Training with `--supervise`: what chance has ended is started again."""

    max_restarts_per_hour: int = Field(default=5, ge=1)
    """[restarts] One more within an hour is not made, nor one after a restart that brought no step."""
