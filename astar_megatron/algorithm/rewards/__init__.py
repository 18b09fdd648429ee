"""Rewards: pure functions of a response's text and the prompt's answer, one rule for sweep, training and evaluation.

Named ones are listed in `_NAMED`; `package.module:function` names any other. `version` is the identity that the
contract of a V* table carries: raise the integer of a named reward whenever it could score any response differently.
Leaves out: time limits and processes (a reward here runs in the caller).
"""

import dataclasses
import difflib
import hashlib
import importlib
import inspect
import math as mathematics
import numbers as numeric
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from astar_megatron.algorithm.rewards.latex import math
from astar_megatron.algorithm.rewards.numbers import gsm8k_flexible, gsm8k_strict, last_number
from astar_megatron.types import Prompt, Rollout

type Reward = Callable[[str, str], float]  # (response text, answer) -> reward

_NAMED: dict[str, tuple[Reward, int]] = {
    "gsm8k_flexible": (gsm8k_flexible, 1),
    "gsm8k_strict": (gsm8k_strict, 1),
    "last_number": (last_number, 1),
    "math": (math, 1),
}


class RewardError(ValueError):
    """A reward raised, or returned what is no finite number; the message names the prompt and the response."""


def names() -> list[str]:
    """Return the named rewards, sorted."""
    return sorted(_NAMED)


def get(name: str) -> Reward:
    """Return the reward called `name`, or the function of `package.module:function`. Raises ValueError."""
    if name in _NAMED:
        return _NAMED[name][0]
    if ":" in name:
        return _imported(name)
    near = difflib.get_close_matches(name, names(), n=1, cutoff=0.0)[0]
    raise ValueError(
        f"reward.name: no reward {name!r}; the nearest is {near}, all are {', '.join(names())}, "
        "or give package.module:function"
    )


def version(name: str) -> str:
    """Return the identity of the rule behind `name`: name and version number, or a digest of a function's source.

    The digest covers the function alone, not what it calls. Raises ValueError.
    """
    reward = get(name)
    if name in _NAMED:
        return f"{name}/{_NAMED[name][1]}"
    try:
        source = inspect.getsource(reward)
    except (OSError, TypeError):
        raise ValueError(
            f"reward.name: {name} has no Python source to take a digest of; wrap it in a Python function"
        ) from None
    return f"{name}/sha256:{hashlib.sha256(source.encode()).hexdigest()}"


def score(reward: Reward, rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Return the rollouts with `reward` set, in order. Raises RewardError at the first that can't be scored."""
    return [dataclasses.replace(rollout, reward=_call(reward, rollout.prompt, rollout.text)) for rollout in rollouts]


def check(reward: Reward, prompts: Sequence[Prompt]) -> None:
    """Score an empty response to each prompt, before anything costs: raises RewardError for an answer it can't read."""
    for prompt in prompts:
        _call(reward, prompt, "")


def _call(reward: Reward, prompt: Prompt, response: str) -> float:
    try:
        value = reward(response, prompt.answer)
    except (Exception, SystemExit) as error:  # a stranger's function: its prompt tells why
        raise RewardError(_explain(reward, prompt, response, f"raised {type(error).__name__}: {error}")) from error
    if not isinstance(value, numeric.Real) or not mathematics.isfinite(value):
        raise RewardError(_explain(reward, prompt, response, f"returned {value!r}, expected a finite number"))
    return float(value)


def _explain(reward: Reward, prompt: Prompt, response: str, what: str) -> str:
    name = f"{getattr(reward, '__module__', '')}.{getattr(reward, '__qualname__', repr(reward))}"
    return (
        f"reward {name} {what}\n  prompt {prompt.uid}: {prompt.text!r:.500}\n  answer: {prompt.answer!r:.500}\n"
        f"  response: {response!r:.500}\n  repair the reward or the prompt's answer, or choose another reward.name"
    )


def _imported(name: str) -> Reward:
    module_name, _, function_name = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does; a script like astar's does not
    try:
        found: Any = importlib.import_module(module_name)
        for part in function_name.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:  # a stranger's module may raise anything when it is imported
        raise ValueError(
            f"reward.name: can't import {name!r}: {type(error).__name__}: {error}; expected package.module:function "
            "in the current folder or on the Python path"
        ) from error
    if not callable(found):
        raise ValueError(f"reward.name: {name!r} is {type(found).__name__}, expected a function (response, answer)")
    return cast(Reward, found)
