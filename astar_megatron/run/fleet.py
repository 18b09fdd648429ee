"""Who computes: the policy's Megatron ranks, the engines, and what moves weights from the one to the others."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self

from astar_megatron.cluster import folders
from astar_megatron.cluster.cluster import Cluster
from astar_megatron.cluster.policy_group import PolicyGroup
from astar_megatron.config import RunConfig
from astar_megatron.data import chat
from astar_megatron.data.files import exclusive
from astar_megatron.model.backend import resolve_dtype
from astar_megatron.rollout.pool import EnginePool
from astar_megatron.run import accelerators, resources
from astar_megatron.run.accelerators import Shares
from astar_megatron.run.prepare import check_here, placement_of
from astar_megatron.run.tracking import Clock, Tracker
from astar_megatron.run.weights import LoadedWeights, TransferFolder, WeightSync
from conversion.families import Model


class Fleet:
    """Policy and engines of a run, and the weights between them. A context manager; one at a time for a run_dir.

    `generating` and `training` are the only places where weights move. Where policy and engines share GPUs the policy
    starts when the engines have taken their part: see accelerators.py. Entering raises ModelFolderError where an engine
    has not loaded what model.path holds.
    """

    policy: PolicyGroup
    engines: EnginePool

    def __init__(self, cfg: RunConfig, model: Model, tracker: Tracker) -> None:
        self._cfg, self._model, self._tracker = cfg, model, tracker
        self._weights: WeightSync | None = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _start(self, stack: ExitStack) -> None:
        cfg, tracker = self._cfg, self._tracker
        stack.enter_context(exclusive(tracker.run_dir / "train.lock", "another training of this run_dir"))
        cluster = stack.enter_context(cluster_of(cfg))
        folders.check_read(cluster, "model.path", _absolute(cfg.model.path))
        folders.check_written(cluster, "run_dir", _absolute(cfg.run_dir))
        placement = cluster.reservation.placement
        (tracker.run_dir / "placement.json").write_text(json.dumps(placement.fields(), indent=1), encoding="utf-8")
        tracker.say(placement.describe())
        tracker.say(f"computing in {compute_type(cfg, cluster)[1]}")
        shares = _shares(cfg, cluster, self._model) if placement.shared else None
        self.engines = stack.enter_context(closing(start_engines(cfg, cluster)))
        loaded = LoadedWeights(cfg.model.path, self.engines.tensor, compute_type(cfg, cluster)[0])
        if shares:
            tracker.say(shares.describe())
            _wait_for(self.engines, tracker)
        self.policy = stack.enter_context(closing(start_policy(cfg, cluster, shares)))
        if not shares:
            _wait_for(self.engines, tracker)
        loaded.verify(self.engines)
        with tracker.waiting("starting the policy"):
            reason = self.policy.start()
        tracker.say(f"policy on {cfg.parallel.describe()}: {reason}")

    @contextmanager
    def generating(
        self, version: int, clock: Clock, drained: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> Iterator[None]:
        """The engines have the policy's weights after `version` batches. Raises WeightMismatch if one has not.

        They get them in `drained`, where no request is in flight; by default those in flight go on under new weights.
        """
        with ExitStack() as stack:
            with clock.span("drain"):
                stack.enter_context(drained())
            with clock.span("publish"):
                if self._weights is None:
                    self._weights = self._open()
                self._weights.publish(version)
        yield

    @contextmanager
    def training(self) -> Iterator[None]:
        """The policy may step. Engines that share its GPU keep their part of the memory."""
        yield

    def export(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder. Raises WeightMismatch if its files are not what the ranks hold."""
        with TransferFolder() as transfer:
            self.policy.export(folder, transfer.path)

    def _open(self) -> WeightSync:
        folder = self._stack.enter_context(TransferFolder())
        weights = WeightSync(self.policy, self.engines, self._model, folder.path, self._cfg.conversion)
        self._tracker.say(f"weights go to the engines by {weights.reason}")
        return weights


@contextmanager
def engines_of(cfg: RunConfig, tracker: Tracker, model_path: str | None = None) -> Iterator[EnginePool]:
    """Ray and a started pool, for a program that needs no policy; `model_path` as in `start_engines`.

    Raises ModelFolderError where an engine has not loaded what the folder holds.
    """
    with ExitStack() as stack:
        cluster = stack.enter_context(cluster_of(cfg, with_policy=False))
        folders.check_read(cluster, "model" if model_path else "model.path", _absolute(model_path or cfg.model.path))
        engines = stack.enter_context(closing(start_engines(cfg, cluster, model_path)))
        tracker.say(cluster.reservation.placement.describe())
        loaded = LoadedWeights(model_path or cfg.model.path, engines.tensor, compute_type(cfg, cluster)[0])
        _wait_for(engines, tracker)
        loaded.verify(engines)
        yield engines


@contextmanager
def cluster_of(cfg: RunConfig, *, with_policy: bool = True) -> Iterator[Cluster]:
    """Ray, with the nodes and GPUs of a run reserved. Raises PlacementError, ResourceError where they are too few."""
    check_here(cfg, with_policy=with_policy)
    with Cluster(cfg.cluster) as cluster:
        cluster.reserve(placement_of(cfg, cluster.nodes.values(), with_policy=with_policy))
        yield cluster


def _shares(cfg: RunConfig, cluster: Cluster, model: Model) -> Shares:
    sizes = cluster.reservation.on_gpus(resources.accelerator_bytes)
    return accelerators.shares_of(cfg, model, min(sizes.values()))


def compute_type(cfg: RunConfig, cluster: Cluster) -> tuple[str, str]:
    """Return the name of the type that policy and engines compute in, and why."""
    dtype, reason = resolve_dtype(cfg.model.dtype, cluster.num_gpus)
    return str(dtype).removeprefix("torch."), reason


def start_engines(cfg: RunConfig, cluster: Cluster, model_path: str | None = None) -> EnginePool:
    """Begin to start the pool with the weights of `model_path` (none: the run's model); `.start()` waits for it.

    The cluster is `cluster_of` the run.
    """
    return EnginePool(
        cluster,
        cfg.rollout,
        model_path=_absolute(model_path or cfg.model.path),
        dtype=compute_type(cfg, cluster)[0],
        max_tokens=cfg.max_tokens,
        stop_token_ids=chat.stop_token_ids(cfg.model.path),
        detokenize=chat.detokenizer(cfg.model.path),
        seed=cfg.seed,
    )


def start_policy(cfg: RunConfig, cluster: Cluster, shares: Shares | None = None) -> PolicyGroup:
    """Begin to start the Megatron ranks; `.start()` waits for them. `shares` as engines on their GPUs leave them."""
    return PolicyGroup(
        cluster,
        model=cfg.model,
        model_path=_absolute(cfg.model.path),
        dtype=compute_type(cfg, cluster)[0],
        parallel=cfg.parallel,
        optim=cfg.optim,
        optimizer_steps=cfg.optimizer_steps,
        critic_lr=cfg.critic_lr,
        seed=cfg.seed,
        gpu_share=shares.policy_share if shares else 1.0,
    )


def _absolute(path: str) -> str:
    """An actor of a cluster that was started elsewhere has another working directory."""
    return str(Path(path).resolve())


def _wait_for(engines: EnginePool, tracker: Tracker) -> None:
    tracker.say(f"engines {engines.graphs}")
    with tracker.waiting("starting the engines", engines.phase):
        engines.start()
