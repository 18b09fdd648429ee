"""What every program of a run opens first: the checks that cost nothing, then Ray, then the engines.

`prepare` reads everything that a user can have got wrong and refuses it before a process is started.
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from astar_megatron import accelerators, resources
from astar_megatron.accelerators import Shares
from astar_megatron.cluster.cluster import Cluster
from astar_megatron.cluster.policy_group import PolicyGroup
from astar_megatron.config import RewardConfig, RunConfig
from astar_megatron.data import chat
from astar_megatron.data.benchmarks import BENCHMARKS, benchmark_prompts, check_names, longest_prompt
from astar_megatron.data.contract import Contract, contract_of
from astar_megatron.data.files import exclusive
from astar_megatron.data.prompts import read_prompts
from astar_megatron.model import layouts
from astar_megatron.model.backend import check_features, resolve_dtype
from astar_megatron.rollout.engine import check_graphs
from astar_megatron.rollout.pool import EnginePool
from astar_megatron.rollout.scoring import Scorer
from astar_megatron.tracking import Tracker
from astar_megatron.types import Prompt
from astar_megatron.weights import LoadedWeights
from conversion import hf
from conversion.families import Model, read_model

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSet:
    """Problems to evaluate: a benchmark, or "prompts", the run's own."""

    name: str
    prompts: list[Prompt]
    reward: RewardConfig
    num_samples: int  # beside the greedy response


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a run reads before it starts: prompts, model tables; all of it checked, the reward too."""

    prompts: list[Prompt]
    eval_sets: list[EvalSet]
    contract: Contract
    model: Model


def prepare(cfg: RunConfig, *, for_training: bool = True) -> Inputs:
    """Read and check a run's inputs. Raises ValueError (its subclasses) naming what is wrong and what to change.

    Without training, and with benchmarks to evaluate, the run's prompts are not needed and stay empty.
    """
    if cfg.cluster.address is None:  # else its machines are asked when it is joined
        num_accelerators = resources.measure().num_accelerators
        check_features(cfg.model, cfg.optim, num_accelerators)
        check_graphs(cfg.rollout, on_gpu=num_accelerators > 0)
    with naming("model.path"):
        model = read_model(cfg.model.path)
    with naming("rollout.tensor"):
        model.vllm_tiles(cfg.rollout.tensor)
    layouts.check(cfg.parallel, model, sequences=cfg.mini_batch_size)
    limit = model.gpt_options()["max_sequence_length"]
    if cfg.max_tokens > limit:
        raise ValueError(
            f"data.max_prompt_tokens + sampling.max_response_tokens: {cfg.max_tokens} exceeds the {limit} positions "
            f"of {cfg.model.path}; lower one of them"
        )
    with naming("model.path"):
        hf.check(cfg.model.path, model.parameters())
        hf.check_engines_read(cfg.model.path)
    contract = contract_of(cfg)
    prompts = read_prompts(cfg.data, cfg.model.path) if for_training or not cfg.eval.benchmarks else []
    eval_sets = _eval_sets(cfg, prompts)
    for name in {cfg.reward.name, *(one.reward.name for one in eval_sets)}:
        with Scorer(cfg.reward.model_copy(update={"name": name})) as scorer:
            scorer.check([prompt for one in eval_sets if one.reward.name == name for prompt in one.prompts])
            scorer.check(prompts if name == cfg.reward.name else [])
    resources.check_run(cfg, model_bytes=4 * model.num_parameters())
    _say_template(cfg, contract)
    return Inputs(
        prompts=prompts,
        eval_sets=eval_sets,
        contract=contract,
        model=model,
    )


def _say_template(cfg: RunConfig, contract: Contract) -> None:
    """Log what of the chat template no number shows: the day that it writes, and a turn's end that ends no response."""
    if contract.date is not None:
        _LOG.warning("data.date: the chat template writes the day %s into each prompt of this run", contract.date)
    elif cfg.data.date is not None:
        _LOG.warning("data.date: %s has no effect: the chat template asks for no time", cfg.data.date)
    if said := chat.unstopped_turn(cfg.model.path, cfg.data.date):
        _LOG.warning("%s", said)


def with_room(cfg: RunConfig) -> RunConfig:
    """Return the configuration with room for its benchmarks' longest prompt, for a program that only evaluates."""
    if not cfg.eval.benchmarks or cfg.eval.folder is None:
        return cfg
    folder, model_path = cfg.eval.folder, cfg.model.path
    longest = max(longest_prompt(name, folder, cfg.data, model_path) for name in cfg.eval.benchmarks)
    room = max(longest, cfg.data.max_prompt_tokens)
    return cfg.model_copy(update={"data": cfg.data.model_copy(update={"max_prompt_tokens": room})})


def _eval_sets(cfg: RunConfig, prompts: list[Prompt]) -> list[EvalSet]:
    """The benchmarks of the configuration; without any, the run's evaluation prompts, or all its prompts."""
    first = slice(cfg.eval.max_prompts)
    if not cfg.eval.benchmarks:
        own = read_prompts(cfg.data, cfg.model.path, cfg.data.eval_path) if cfg.data.eval_path else prompts
        return [EvalSet(name="prompts", prompts=own[first], reward=cfg.reward, num_samples=cfg.eval.num_samples or 0)]
    check_names(cfg.eval.benchmarks)
    assert cfg.eval.folder is not None  # config.py's cross-check
    sets = []
    for name in cfg.eval.benchmarks:
        asked = BENCHMARKS[name].num_samples if cfg.eval.num_samples is None else cfg.eval.num_samples
        problems = benchmark_prompts(name, cfg.eval.folder, cfg.data, cfg.model.path)
        rule = cfg.reward.model_copy(update={"name": BENCHMARKS[name].reward})
        sets.append(EvalSet(name=name, prompts=problems[first], reward=rule, num_samples=asked))
    return sets


def check_ranks(cfg: RunConfig) -> Shares | None:
    """Raise LayoutError where training has more Megatron ranks than the engines leave accelerators on this machine.

    Without accelerators ranks share the cores. A run that joins a Ray cluster asks that one, in `started`. Returns the
    shares of policy and engine where there is one accelerator for both, and raises ResourceError if they don't fit it.
    """
    machine = resources.measure()
    if cfg.cluster.address is not None or not machine.num_accelerators:
        return None
    _check_places(cfg, *accelerators.free_accelerators(cfg, machine.num_accelerators))
    return accelerators.shares_of(cfg, read_model(cfg.model.path), machine)


def _check_places(cfg: RunConfig, places: int, what: str) -> None:
    model = read_model(cfg.model.path)
    layouts.check(cfg.parallel, model, sequences=cfg.mini_batch_size, available=places, what=what)


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Put the key of the configuration before the message of a ValueError that knows nothing of it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def compute_type(cfg: RunConfig, cluster: Cluster) -> tuple[str, str]:
    """Return the name of the type that policy and engines compute in, and why."""
    dtype, reason = resolve_dtype(cfg.model.dtype, cluster.num_gpus)
    return str(dtype).removeprefix("torch."), reason


def start_engines(
    cfg: RunConfig, cluster: Cluster, model_path: str | None = None, shares: Shares | None = None
) -> EnginePool:
    """Begin to start the pool with the weights of `model_path` (none: the run's model); `.start()` waits for it.

    With `shares` the engine has its GPU together with the policy.
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
        shares_gpu=shares is not None,
    )


def start_policy(cfg: RunConfig, cluster: Cluster, shares: Shares | None = None) -> PolicyGroup:
    """Begin to start the Megatron ranks; `.start()` waits for them. `shares` as in `start_engines`."""
    return PolicyGroup(
        cluster,
        model=cfg.model,
        model_path=_absolute(cfg.model.path),
        dtype=compute_type(cfg, cluster)[0],
        parallel=cfg.parallel,
        optim=cfg.optim,
        optimizer_steps=cfg.optimizer_steps,
        seed=cfg.seed,
        gpu_share=shares.policy_share if shares else 1.0,
    )


def _absolute(path: str) -> str:
    """An actor of a cluster that was started elsewhere has another working directory."""
    return str(Path(path).resolve())


@contextmanager
def started(cfg: RunConfig, tracker: Tracker) -> Iterator[tuple[PolicyGroup, EnginePool]]:
    """The policy's ranks and the pool, started side by side; only one process at a time has them for a run_dir.

    Where they share a GPU the policy starts when the engine has taken its part: see accelerators.py. Raises
    CheckpointError where an engine has not loaded what model.path holds.
    """
    shares = check_ranks(cfg)
    with ExitStack() as stack:
        stack.enter_context(exclusive(tracker.run_dir / "train.lock", "another training of this run_dir"))
        cluster = stack.enter_context(Cluster(cfg.cluster))
        if cluster.num_gpus:
            _check_places(cfg, *accelerators.free_accelerators(cfg, cluster.num_gpus))
        tracker.say(f"computing in {compute_type(cfg, cluster)[1]}")
        engines = stack.enter_context(closing(start_engines(cfg, cluster, shares=shares)))
        loaded = LoadedWeights(cfg.model.path, engines.tensor, compute_type(cfg, cluster)[0])
        if shares:
            tracker.say(shares.describe())
            _wait_for(engines, tracker)
        policy = stack.enter_context(closing(start_policy(cfg, cluster, shares)))
        if not shares:
            _wait_for(engines, tracker)
        loaded.verify(engines)
        with tracker.waiting("starting the policy"):
            reason = policy.start()
        tracker.say(f"policy on {layouts.described(cfg.parallel)}: {reason}")
        yield policy, engines


def _wait_for(engines: EnginePool, tracker: Tracker) -> None:
    tracker.say(f"engines {engines.graphs}")
    with tracker.waiting("starting the engines", engines.phase):
        engines.start()


@contextmanager
def engines_of(cfg: RunConfig, tracker: Tracker, model_path: str | None = None) -> Iterator[EnginePool]:
    """Ray and a started pool, for a program that needs no policy; `model_path` as in `start_engines`.

    Raises CheckpointError where an engine has not loaded what the folder holds.
    """
    with Cluster(cfg.cluster) as cluster, closing(start_engines(cfg, cluster, model_path)) as engines:
        loaded = LoadedWeights(model_path or cfg.model.path, engines.tensor, compute_type(cfg, cluster)[0])
        _wait_for(engines, tracker)
        loaded.verify(engines)
        yield engines
