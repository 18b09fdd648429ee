"""The keys of what computes: the policy's ranks, the engines, the weights between them, Ray."""

from typing import Literal

from pydantic import Field

from astar_megatron.config_file import Name, Section

type Recompute = Literal["none", "selective", "full"]
type Graphs = Literal["none", "decode", "compiled"]


class ParallelConfig(Section):
    """Megatron ranks of the policy: world = tensor * pipeline * context * data.

    What needs no key: with tensor > 1 the ranks share the tokens between the matrices (sequence parallelism), and with
    context * data > 1 gradients are reduced and weights gathered while others are computed.
    """

    tensor: int = Field(default=1, ge=1)
    """[ranks] Ranks that share each matrix."""
    pipeline: int = Field(default=1, ge=1)
    """[ranks] Stages, each with a part of the layers."""
    virtual: int = Field(default=1, ge=1)
    """[parts] Parts of the model that a stage holds and runs in turn (interleaved 1F1B)."""
    context: int = Field(default=1, ge=1)
    """[ranks] Ranks that share the tokens of each sequence."""
    data: int = Field(default=1, ge=1)
    """[ranks] Ranks that share the sequences."""
    expert: int = Field(default=1, ge=1)
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

    num_engines: int = Field(default=1, ge=1)
    """[engines] Engines, which share the responses to draw."""
    tensor: int = Field(default=1, ge=1)
    """[workers] Workers of an engine, which share each matrix."""
    max_num_seqs: int = Field(default=256, ge=1)
    """[sequences] Sequences that an engine decodes at once."""
    kv_cache_gib: int = Field(default=1, ge=1)
    """[GiB] Host memory for an engine's keys and values; on a CPU only."""
    gpu_memory_utilization: float = Field(default=0.5, gt=0.0, lt=1.0)
    """[share] Part of a GPU's memory that an engine takes; on a GPU only."""
    max_staleness: int = Field(default=0, ge=0)
    """[versions] How much older than the policy the weights may be that drew a response. Above 0 engines draw ahead."""
    update: Literal["in_flight", "drain"] = "in_flight"
    """How weights reach an engine that draws ahead: its responses freeze and go on under the new ones, or end first."""
    graphs: Graphs | None = None
    """`decode`: captured graphs; `compiled`: torch.compile too, minutes at the start; null: `decode` if on a GPU."""


class ConversionConfig(Section):
    """How weights move from the policy to the engines."""

    bucket_bytes: int = Field(default=64 << 20, ge=4096)
    """[bytes] Size of each of the two buckets through which a rank sends."""


class ClusterConfig(Section):
    """Ray: joined at `address`, or started here when there is none."""

    address: Name | None = None
    """host:port of a Ray that runs; null: one is started on this machine."""
    share_gpus: bool | None = None
    """Whether policy ranks and engine workers are on the same GPUs; null: where there are too few for both apart."""
    threads: int | None = Field(default=None, ge=1)
    """[threads] CPU threads of an actor; null: a side's actors share the cores evenly."""
    start_timeout_seconds: float = Field(default=300.0, gt=0.0)
    """[seconds] How long the engines may take to start, and the policy."""
