"""What a run reads before anything starts: everything that a user can have got wrong is refused here."""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from astar_megatron.cluster import address
from astar_megatron.cluster.placement import Node, Placement, place
from astar_megatron.config import ParallelConfig, RewardConfig, RunConfig, check_drawn_whole
from astar_megatron.data import chat
from astar_megatron.data.benchmarks import BENCHMARKS, benchmark_prompts, check_names, longest_prompt
from astar_megatron.data.contract import Contract, contract_of
from astar_megatron.data.prompts import read_prompts
from astar_megatron.model import layouts
from astar_megatron.model.backend import check_features
from astar_megatron.rollout.engine import check_graphs, check_head_size
from astar_megatron.rollout.scoring import Scorer
from astar_megatron.run import accelerators, resources
from astar_megatron.run.accelerators import Shares
from astar_megatron.run.checkpoints import CHECKPOINTS_FOLDER
from astar_megatron.run.local_accelerators import local_accelerators
from astar_megatron.run.scores import OWN_PROMPTS
from astar_megatron.types import Prompt
from conversion import hf
from conversion.families import Model, read_model
from conversion.weight_files import check_engines_read

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSet:
    """Problems to evaluate: a benchmark, or "prompts", the run's own."""

    name: str
    source: str  # the file of its problems, or the folder of benchmarks
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


def prepare(cfg: RunConfig, *, for_training: bool = True, known: Inputs | None = None) -> Inputs:
    """Read and check a run's inputs. Raises ValueError (its subclasses) naming what is wrong and what to change.

    Without training, and with benchmarks to evaluate, the run's prompts are not needed and stay empty. Problems are not
    read again that are `known` of another run whose sections data, model, reward and eval are equal.
    """
    if cfg.cluster.address is None:  # else its machines are asked when it is joined
        num_accelerators = resources.measure().num_accelerators
        capabilities = [accelerator.capability for accelerator in local_accelerators() or ()]
        check_features(cfg.model, cfg.optim, num_accelerators, min(capabilities, default=None))
        check_graphs(cfg.rollout, on_gpu=num_accelerators > 0)
    if for_training:
        check_drawn_whole(cfg)
    _check_apart(cfg, for_training=for_training)
    with naming("model.path"):
        model = read_model(cfg.model.path)
        if cfg.cluster.address is None:
            check_head_size(model.dims.head_dim, on_gpu=resources.measure().num_accelerators > 0)
    with naming("rollout.tensor"):
        model.vllm_tiles(cfg.rollout.tensor)
    layouts.check(cfg.parallel, model, sequences=cfg.mini_batch_size)
    layouts.check_lengths(model, cfg.model.path, max_tokens=cfg.max_tokens)
    with naming("model.path"):
        check_engines_read(cfg.model.path)
        hf.check(cfg.model.path, model.parameters())
    contract = contract_of(cfg)
    if known is None:
        prompts = read_prompts(cfg.data, cfg.model.path) if for_training or not cfg.eval.benchmarks else []
        eval_sets = _eval_sets(cfg, prompts)
        _check_rewards(cfg.reward, prompts, eval_sets)
    else:
        prompts, eval_sets = known.prompts, known.eval_sets
    resources.check_run(cfg, model)
    if cfg.cluster.address is not None:
        address.knock(cfg.cluster.address)
    _say_template(cfg, contract)
    return Inputs(
        prompts=prompts,
        eval_sets=eval_sets,
        contract=contract,
        model=model,
    )


def _check_rewards(cfg: RewardConfig, prompts: Sequence[Prompt], eval_sets: Sequence[EvalSet]) -> None:
    """Raise ValueError where a reward can't score a problem."""
    by_reward = {cfg.name: {prompt.uid: prompt for prompt in prompts}}
    for eval_set in eval_sets:
        by_reward.setdefault(eval_set.reward.name, {}).update({prompt.uid: prompt for prompt in eval_set.prompts})
    for name, by_uid in by_reward.items():
        with Scorer(cfg.model_copy(update={"name": name})) as scorer:
            scorer.check(list(by_uid.values()))


def _check_apart(cfg: RunConfig, *, for_training: bool) -> None:
    """Raise ValueError where a run would write into its model's folder, or replace it, as training does."""
    model, table, run_dir = _real(cfg.model.path), _real(cfg.table_dir), _real(cfg.run_dir)
    for key, folder in {"run_dir": run_dir, "sweep.table": table}.items():
        if model in (folder, *folder.parents):
            raise ValueError(f"{key}: {folder} is, or lies in, the folder of model.path; choose another place")
    for folder in (_real(cfg.export_dir), run_dir / CHECKPOINTS_FOLDER, table) if for_training else ():
        if folder in (model, *model.parents):
            raise ValueError(
                f"model.path: {model} is, or lies in, {folder}, which this run writes and replaces; choose another "
                "run_dir, or move the model"
            )


def _real(path: str | Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises for a link to itself


def _say_template(cfg: RunConfig, contract: Contract) -> None:
    """Log what of tokens and template no number shows: a class's tokens, the day, what prompts lack, unended turns."""
    if contract.date is not None:
        _LOG.warning("data.date: the chat template writes the day %s into each prompt of this run", contract.date)
    elif cfg.data.date is not None:
        _LOG.warning("data.date: %s has no effect: the chat template asks for no time", cfg.data.date)
    problems = (chat.unbegun_prompt, chat.unbegun_answer, chat.unstopped_turn)
    model, date = cfg.model.path, cfg.data.date
    for warning in (chat.without_its_file(model), *(problem(model, date) for problem in problems)):
        if warning:
            _LOG.warning("%s", warning)


def with_room(cfg: RunConfig) -> RunConfig:
    """Return the configuration with room for its benchmarks' longest prompt, for a program that only evaluates."""
    if not cfg.eval.benchmarks or cfg.eval.folder is None:
        return cfg
    check_names(cfg.eval.benchmarks)
    folder, model_path = cfg.eval.folder, cfg.model.path
    longest = max(longest_prompt(name, folder, cfg.data, model_path) for name in cfg.eval.benchmarks)
    room = max(longest, cfg.data.max_prompt_tokens)
    return cfg.model_copy(update={"data": cfg.data.model_copy(update={"max_prompt_tokens": room})})


def _eval_sets(cfg: RunConfig, prompts: list[Prompt]) -> list[EvalSet]:
    """The benchmarks of the configuration; without any, the run's evaluation prompts, or all its prompts."""
    first = slice(cfg.eval.max_prompts)
    if not cfg.eval.benchmarks:
        own = read_prompts(cfg.data, cfg.model.path, cfg.data.eval_path) if cfg.data.eval_path else prompts
        source, count = str(cfg.data.eval_path or cfg.data.path), cfg.eval.num_samples or 0
        return [EvalSet(name=OWN_PROMPTS, source=source, prompts=own[first], reward=cfg.reward, num_samples=count)]
    check_names(cfg.eval.benchmarks)
    assert cfg.eval.folder is not None  # config.py's cross-check
    sets = []
    for name in cfg.eval.benchmarks:
        asked = BENCHMARKS[name].num_samples if cfg.eval.num_samples is None else cfg.eval.num_samples
        problems = benchmark_prompts(name, cfg.eval.folder, cfg.data, cfg.model.path)
        rule = cfg.reward.model_copy(update={"name": BENCHMARKS[name].reward})
        source = str(cfg.eval.folder)
        sets.append(EvalSet(name=name, source=source, prompts=problems[first], reward=rule, num_samples=asked))
    return sets


def placement_of(cfg: RunConfig, nodes: Iterable[Node], *, with_policy: bool = True) -> Placement:
    """Return where the run's ranks, if it has a policy, and its engines go. Raises PlacementError."""

    def parts() -> Iterable[ParallelConfig]:
        return layouts.parts(cfg.parallel, read_model(cfg.model.path), sequences=cfg.mini_batch_size)

    return place(nodes, cfg.parallel if with_policy else None, cfg.rollout, cfg.cluster.share_gpus, parts)


def check_here(cfg: RunConfig, *, with_policy: bool = True) -> tuple[Placement, Shares | None] | None:
    """Return where the run goes on this machine, and the shares of GPUs that have both sides; before Ray is started.

    None for a run that joins a Ray cluster: its nodes are asked when it has. Raises PlacementError, ResourceError.
    """
    if cfg.cluster.address is not None:
        return None
    machine = resources.measure()
    nodes = [Node(address="127.0.0.1", num_gpus=machine.num_accelerators)]
    placement = placement_of(cfg, nodes, with_policy=with_policy)
    if not placement.shared:
        return placement, None
    return placement, accelerators.shares_of(cfg, read_model(cfg.model.path), machine.accelerator_bytes)


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Put the key of the configuration before the message of a ValueError that knows nothing of it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
