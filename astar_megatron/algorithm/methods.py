"""Which method trains, by `objective.name`, and what it takes of stage 1."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from astar_megatron.algorithm.astar import astar_of
from astar_megatron.algorithm.clipped import TokenMean
from astar_megatron.algorithm.grpo import Grpo
from astar_megatron.algorithm.oapl import Oapl
from astar_megatron.algorithm.objective import Objective
from astar_megatron.algorithm.ppo import Ppo
from astar_megatron.algorithm.rebel import Rebel
from astar_megatron.algorithm.spo import Spo
from astar_megatron.config import Clipped, RunConfig

# Of each method the name that it has in writing, and its paper.
PAPERS: Mapping[str, tuple[str, str]] = {
    "astar": ("A*PO", "arXiv 2505.20686"),
    "oapl": ("OAPL", "arXiv 2602.19362"),
    "grpo": ("GRPO", "arXiv 2402.03300"),
    "rebel": ("REBEL", "arXiv 2404.16767"),
    "ppo": ("PPO", "arXiv 1707.06347"),
    "spo": ("SPO", "arXiv 2509.13232"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage1:
    """What the samples of stage 1 say of each prompt, by uid; empty for a method that reads none."""

    v_star: Mapping[str, float] = field(default_factory=dict)  # at the method's beta1
    v_star_at_beta2: Mapping[str, float] = field(default_factory=dict)  # of A*PO
    samples: Mapping[str, int] = field(default_factory=dict)
    success: Mapping[str, float] = field(default_factory=dict)  # mean of the rewards, those below 0 taken as 0


def objective_of(cfg: RunConfig, stage_1: Stage1) -> Objective:
    """Return the run's method, as it begins with what stage 1 found."""
    is_stale = cfg.rollout.max_staleness > 0
    match cfg.objective.name:
        case "astar":
            return astar_of(cfg, stage_1.v_star, stage_1.samples, stage_1.v_star_at_beta2)
        case "oapl":
            return Oapl(cfg.oapl, stage_1.v_star, cfg.optim.loss_scale)
        case "grpo":
            return Grpo(cfg.grpo, _token_mean(cfg, cfg.grpo), old_from_engine=is_stale)
        case "rebel":
            return Rebel(cfg.rebel)
        case "ppo":
            return Ppo(cfg.ppo, _token_mean(cfg, cfg.ppo), old_from_engine=is_stale)
        case "spo":
            return Spo(cfg.spo, _token_mean(cfg, cfg.spo), stage_1.success, stage_1.samples)


def _token_mean(cfg: RunConfig, method: Clipped) -> TokenMean:
    return TokenMean(
        over=method.loss, mini_batch_size=cfg.mini_batch_size, max_response_tokens=cfg.sampling.max_response_tokens
    )
