"""Who computes: the policy's Megatron ranks, the engines, and what moves weights from the one to the others."""

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self

from astar_megatron.cluster import folders
from astar_megatron.cluster.cluster import Cluster
from astar_megatron.cluster.errors import ActorLost
from astar_megatron.cluster.policy_group import PolicyGroup
from astar_megatron.config import RunConfig
from astar_megatron.data import chat
from astar_megatron.data.files import exclusive, write_json
from astar_megatron.model.backend import check_features
from astar_megatron.model.compute_type import compute_type
from astar_megatron.model.options import PolicyOptions
from astar_megatron.rollout.engine import EngineOptions
from astar_megatron.rollout.member import Member
from astar_megatron.rollout.pool import EnginePool
from astar_megatron.run import accelerators, resources
from astar_megatron.run.accelerators import Shares
from astar_megatron.run.decoding import DecodePath
from astar_megatron.run.prepare import check_here, placement_of
from astar_megatron.run.sharing import Turns
from astar_megatron.run.tracking import PLACEMENT_FILE, Clock, Tracker, read_metrics
from astar_megatron.run.weights import LoadedWeights, TransferFolder, WeightSync
from conversion.families import Model

_MOST_RESTARTS = 3  # of the policy without a new step in between


class Fleet:
    """Policy and engines of a run, and the weights between them. A context manager; one at a time for a run_dir.

    `generating` and `training` are the only places where weights move, but for an engine that takes a dead one's place.
    Where policy and engines share GPUs they take turns (sharing.py), at the start too: engines load, are checked and
    sleep before the policy starts, and get their weights from it. Entering raises ModelFolderError where an engine has
    not loaded what model.path holds.
    """

    policy: PolicyGroup
    engines: EnginePool

    def __init__(self, cfg: RunConfig, model: Model, tracker: Tracker) -> None:
        self._cfg, self._model, self._tracker = cfg, model, tracker
        self._weights: WeightSync | None = None
        self._published: int | None = None  # the version that engines and policy have, unless the policy has moved on
        self._restarts, self._furthest = 0, -1  # of the policy since it got any further; lines of metrics then
        self._moving = threading.Lock()  # held while weights move
        self._turns: Turns | None = None  # where both sides share memory
        self._decode_path = DecodePath(model.vocab_size, cfg.max_tokens)

    def __enter__(self) -> Self:
        with ExitStack() as self._stack:
            self._start()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _start(self) -> None:
        cfg, tracker, stack = self._cfg, self._tracker, self._stack
        stack.enter_context(exclusive(tracker.run_dir / "train.lock", "another training of this run_dir"))
        cluster = stack.enter_context(cluster_of(cfg))
        folders.check_read(cluster, "model.path", _absolute(cfg.model.path))
        folders.check_written(cluster, "run_dir", _absolute(cfg.run_dir))
        placement = cluster.reservation.placement
        write_json(tracker.run_dir / PLACEMENT_FILE, placement.fields())
        tracker.say(placement.describe())
        tracker.say(f"computing in {compute_type(cfg.model.dtype, cluster.num_gpus)[1]}")
        take_turns = bool(placement.shared) or cfg.cluster.share_gpus is True
        self.engines = stack.enter_context(_closed_in_the_end(start_engines(cfg, cluster, sleep=take_turns)))
        self._loaded = LoadedWeights(cfg.model.path, self.engines.tensor, self.engines.dtype)
        self.engines.bring = self.heal
        if take_turns:
            self._start_by_turns(cluster, _shares(cfg, cluster, self._model) if placement.shared else None)
            return
        self.policy = stack.enter_context(_closed_in_the_end(start_policy(cfg, cluster)))  # while the engines start
        _wait_for(self.engines, tracker)
        self._loaded.verify(self.engines)
        self._wait_for_policy()

    def _start_by_turns(self, cluster: Cluster, shares: Shares | None) -> None:
        """Engines first: vLLM measures what memory is free, and the policy takes what they give back."""
        if shares:
            self._tracker.say(shares.describe())
        _wait_for(self.engines, self._tracker)
        self._loaded.verify(self.engines)
        self.engines.hold_back()
        returned = self.engines.sleep()
        self.policy = self._stack.enter_context(_closed_in_the_end(start_policy(self._cfg, cluster, shares)))
        self._wait_for_policy()
        self._turns = Turns(self.policy, self.engines, self._cfg.train.offload, self._tracker.say, returned)
        with self.generating(0, Clock()):  # the weights that the engines had, which sleep has lost
            pass

    def _wait_for_policy(self) -> None:
        with self._tracker.waiting("starting the policy"):
            reason = self.policy.start()
        self._tracker.say(f"policy on {self._cfg.parallel.describe()}: {reason}")

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
            weights = self._publish(version, clock)
            if not self._decode_path.is_proved:
                with clock.span("publish", "ranks", "engines"):
                    if words := self._decode_path.look(self.engines, self.policy, version, weights):
                        self._tracker.say(words)
        yield

    def _publish(self, version: int, clock: Clock) -> Hashable:
        """Returns what differs where the weights do."""
        with self._moving:
            if self._turns:
                with clock.span("turns", "ranks", "engines"):
                    self._turns.begin_publishing()
            with clock.span("publish", "ranks", "engines"):
                if self._weights is None:
                    self._weights = self._open()
                self._weights.publish(version)
            self._published = version
            if self._turns:
                with clock.span("turns", "engines"):
                    self._turns.begin_generating()
                self.engines.let_start()
            return self._weights.sent

    @contextmanager
    def training(self, clock: Clock) -> Iterator[None]:
        """The policy may step. Engines that share its memory sleep, until they generate again."""
        if self._turns:
            self.engines.hold_back()
        with self._moving:
            self._published = None
            if self._turns:
                with clock.span("turns", "ranks", "engines"):
                    self._turns.begin_training()
        yield

    def heal(self, engine: Member) -> None:
        """Give an engine that has taken another's place the weights that the others have, with the same proof.

        Called by the pool, in a thread of its own. While the policy steps there is nothing to give: the next publish
        is for all engines that run.
        """
        with self._moving:
            try:
                if self._weights is None:
                    self._loaded.verify(self.engines, [engine])
                elif self._published is not None:
                    self._weights.publish(self._published, [engine])
            finally:  # one that failed may get weights from another policy
                self._decode_path.forget(engine.index)

    def restart_policy(self, error: ActorLost) -> None:
        """Start all ranks anew where one died, for training to begin again at its newest checkpoint; engines stay.

        Raises `error` where an engine died, or where that has been done so often without getting any further.
        """
        furthest = len(read_metrics(self._tracker.run_dir))
        self._restarts = self._restarts + 1 if furthest <= self._furthest else 1
        self._furthest = max(furthest, self._furthest)
        if error.kind != "policy rank" or self._restarts > _MOST_RESTARTS:
            raise error
        self._tracker.say(f"{str(error).splitlines()[-1]}; training goes on from the newest checkpoint")
        if self._turns:
            self.engines.hold_back()
        try:
            with self._moving, self._tracker.waiting("starting the policy again"):
                self._published = None
                self.engines.drop_requests()
                if self._weights is not None:
                    self._weights.close()
                restart = self._turns.restart_policy if self._turns else self.policy.restart
                restart()
                self.engines.go_on()
        except ActorLost as another:  # of those that start
            self.restart_policy(another)

    def measured(self) -> dict[str, object]:
        """Return what a step's metrics say: engines replaced since the last call; shared memory, if any."""
        return {"engines_replaced": self.engines.num_replaced(), **(self._turns.measured() if self._turns else {})}

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
        engines = stack.enter_context(_closed_in_the_end(start_engines(cfg, cluster, model_path)))
        tracker.say(cluster.reservation.placement.describe())
        loaded = LoadedWeights(model_path or cfg.model.path, engines.tensor, engines.dtype)
        engines.bring = lambda engine: loaded.verify(engines, [engine])
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


def start_engines(
    cfg: RunConfig, cluster: Cluster, model_path: str | None = None, *, sleep: bool = False
) -> EnginePool:
    """Begin to start the pool with the weights of `model_path` (none: the run's model); `.start()` waits for it.

    The cluster is `cluster_of` the run; `sleep` says that engines will be asked to.
    """
    options = EngineOptions(
        model_path=_absolute(model_path or cfg.model.path),
        dtype=compute_type(cfg.model.dtype, cluster.num_gpus)[0],
        max_tokens=cfg.max_tokens,
        stop_token_ids=chat.stop_token_ids(cfg.model.path),
        seed=cfg.seed,
        rollout=cfg.rollout,
        on_gpu=cluster.num_gpus > 0,
        sleep=sleep,
    )
    return EnginePool(cluster, options, chat.detokenizer(cfg.model.path))


def start_policy(cfg: RunConfig, cluster: Cluster, shares: Shares | None = None) -> PolicyGroup:
    """Begin to start the Megatron ranks; `.start()` waits for them. `shares` as engines on their GPUs leave them."""
    check_features(cfg.model, cfg.optim, cluster.num_gpus)
    options = PolicyOptions(
        model_path=_absolute(cfg.model.path),
        dtype=compute_type(cfg.model.dtype, cluster.num_gpus)[0],
        parallel=cfg.parallel,
        optim=cfg.optim,
        optimizer_steps=cfg.optimizer_steps,
        seed=cfg.seed,
        reference=cfg.model.reference,
        fp8=cfg.model.fp8,
        critic_lr=cfg.critic_lr,
    )
    return PolicyGroup(cluster, options, gpu_share=shares.policy_share if shares else 1.0)


@contextmanager
def _closed_in_the_end[T: (EnginePool, PolicyGroup)](group: T) -> Iterator[T]:
    """`group`, which is closed after the body; not after an error or a signal: it may be busy, and Cluster ends it."""
    try:
        yield group
    except BaseException:
        if isinstance(group, EnginePool):
            group.let_go()
        raise
    group.close()


def _absolute(path: str) -> str:
    """An actor of a cluster that was started elsewhere has another working directory."""
    return str(Path(path).resolve())


def _wait_for(engines: EnginePool, tracker: Tracker) -> None:
    tracker.say(f"engines {engines.graphs}")
    with tracker.waiting("starting the engines", engines.phase):
        engines.start()
