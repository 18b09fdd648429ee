"""Rows of V* tables: six prompts and their scored rollouts."""

import samples

from astar_megatron.types import Prompt, Rollout

PROMPTS = [Prompt(uid=f"uid-{i}", token_ids=(1, i), text=f"prompt {i}", answer=str(i)) for i in range(6)]


def scored(prompt: Prompt, sample: int, reward: float | None = 0.0, tokens: int = 3) -> Rollout:
    """Return a rollout of `tokens` tokens, 5, 6 and so on."""
    ids = tuple(range(5, 5 + tokens))
    return samples.rollout(prompt, sample=sample, seed=1000 + sample, token_ids=ids, text="text", reward=reward)
