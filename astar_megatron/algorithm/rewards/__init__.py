"""Rewards: pure functions of a response's text and the prompt's answer, one rule for sweep, training and evaluation.

Named ones are listed in `_NAMED`; `package.module:function` names any other. A reward is a number from -1 to 1. It sees
the text alone: a response that the token limit cut is scored as it stands. `version` is the identity that the contract
of a V* table carries: raise the integer of a named reward whenever it could score any response differently.
Leaves out: time limits and processes; rollout/scoring.py has them.
"""

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import numbers as numeric
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any, cast

from astar_megatron.algorithm.rewards import verified
from astar_megatron.algorithm.rewards.latex import boxed_answer, boxed_integer, boxed_list, integer_in, math
from astar_megatron.algorithm.rewards.numbers import (
    flexible_answer,
    gsm8k_flexible,
    gsm8k_strict,
    last_number,
    number_in,
    strict_answer,
)
from astar_megatron.algorithm.rewards.tags import countdown, multiply, tagged_integer, tagged_value
from astar_megatron.algorithm.rewards.verified import math_verify

_PACKAGES = ("astar_megatron", "conversion")
_PLACE = Path(__file__).resolve().parents[3]  # where they are

type Reward = Callable[[str, str], float]  # (response text, answer) -> reward
type Extract = Callable[[str], str | None]  # response text -> the value that is compared; None: wrong form


@dataclass(frozen=True, slots=True, kw_only=True)
class _Named:
    reward: Reward
    version: int
    extract: Extract


_NAMED: dict[str, _Named] = {
    "arithmetic": _Named(reward=multiply, version=1, extract=tagged_integer),  # the same rule for other data
    "boxed_integer": _Named(reward=boxed_integer, version=7, extract=integer_in),
    "countdown": _Named(reward=countdown, version=2, extract=tagged_value),
    "gsm8k_flexible": _Named(reward=gsm8k_flexible, version=4, extract=flexible_answer),
    "gsm8k_strict": _Named(reward=gsm8k_strict, version=2, extract=strict_answer),
    "last_number": _Named(reward=last_number, version=6, extract=number_in),
    "math": _Named(reward=math, version=5, extract=boxed_answer),
    "math_verify": _Named(reward=math_verify, version=8, extract=boxed_list),
    "multiply": _Named(reward=multiply, version=1, extract=tagged_integer),
}


class RewardError(ValueError):
    """A reward raised, hung, or returned what is no reward; the message names the prompt and the response."""


def names() -> list[str]:
    """Return the named rewards, sorted."""
    return sorted(_NAMED)


def get(name: str) -> Reward:
    """Return the reward called `name`, or the function of `package.module:function`. Raises ValueError."""
    if name in _NAMED:
        return _NAMED[name].reward
    if ":" in name:
        return _imported(name)
    near = difflib.get_close_matches(name, names(), n=1, cutoff=0.0)[0]
    raise ValueError(
        f"reward.name: no reward {name!r}; the nearest is {near}, all are {', '.join(names())}, "
        "or give package.module:function"
    )


def extractor(name: str) -> Extract | None:
    """Return the function that finds the value which the reward `name` compares, one text for all equal ones.

    None for a reward of another.
    """
    return _NAMED[name].extract if name in _NAMED else None


def version(name: str) -> str:
    """Return the identity of the rule behind `name`: name and version number, or a digest of its module's file.

    The file is read and not imported: what a stranger's module does when it is imported, it does not do here. Of other
    modules that it imports the digest says nothing. Raises ValueError.
    """
    if name == "math_verify":
        return f"{name}/{_NAMED[name].version}+{verified.library_version()}"
    if name in _NAMED:
        return f"{name}/{_NAMED[name].version}"
    if ":" not in name:
        get(name)  # raises
    return f"{name}/sha256:{hashlib.sha256(_file(name).read_bytes()).hexdigest()}"


def judge(reward: Reward, response: str, answer: str) -> tuple[float | None, str]:
    """Return the reward and "", or None and in words why there is none: it raised, or returned no number in [-1, 1]."""
    value: Any
    try:
        value = reward(response, answer)
        if getattr(value, "shape", None) == ():  # of numpy or torch: an array of no dimensions, numpy.bool
            value = value.item()
        if isinstance(value, numeric.Real) and -1 <= cast(float, value) <= 1:
            return float(value), ""
    except MemoryError as error:
        return None, f"raised {type(error).__name__}: {_told(str, error)}; reward.memory_gib limits its process"
    except (Exception, SystemExit) as error:  # a stranger's function
        return None, f"raised {type(error).__name__}: {_told(str, error)}"
    return None, f"returned {_told(repr, value)}, expected a number from -1 to 1"


def _told(tell: Callable[[Any], str], value: Any) -> str:
    """What `tell`, str or repr, says of a stranger's object; its type where that raises, as of 10**5000."""
    try:
        return tell(value)
    except (Exception, SystemExit):
        return f"<{type(value).__name__} without a text>"


def _file(name: str) -> Path:
    """The file of a function's module. Package after package, for `importlib.util.find_spec` alone imports those."""
    parts = name.partition(":")[0].split(".")
    spec = None
    if all(part.isidentifier() for part in parts):
        here = str(Path.cwd())
        spec = _own(name) or importlib.util.find_spec(parts[0]) or PathFinder.find_spec(parts[0], [here])
    for end in range(2, len(parts) + 1):
        inside = spec and spec.submodule_search_locations
        spec = PathFinder.find_spec(".".join(parts[:end]), inside) if inside else None
    if spec is None:
        raise ValueError(
            f"reward.name: can't import {name!r}: there is no such module; expected package.module:function in the "
            "current folder or on the Python path"
        )
    if spec.origin is None or not spec.origin.endswith(".py"):
        raise ValueError(f"reward.name: {name} has no Python source to take a digest of; wrap it in a Python function")
    return Path(spec.origin)


def _own(name: str) -> ModuleSpec | None:
    """The top-level module or package of the reward `name`, where it is one of the current folder.

    That comes before one of another folder; a folder without __init__.py does not, as everywhere in Python. Raises
    ValueError where it has the name of a module that this program needs.
    """
    top, here = name.partition(":")[0].partition(".")[0], Path.cwd()
    spec = PathFinder.find_spec(top, [str(here)]) if top.isidentifier() else None
    if spec is None or spec.origin is None:
        return None
    loaded = sys.modules.get(top)
    is_loaded = loaded is not None and getattr(loaded.__spec__, "origin", None) != spec.origin
    if is_loaded or top in sys.stdlib_module_names or (top in _PACKAGES and here != _PLACE):
        raise ValueError(
            f"reward.name: can't import {name!r}: {spec.origin} has the name of a module that this program needs; "
            "rename it, and reward.name with it"
        )
    return spec


def _imported(name: str) -> Reward:
    module_name, _, function_name = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # last: what lies beside a reward must not take the place of Python's modules and ours
    own = _own(name)
    try:
        if own is not None and own.name not in sys.modules:
            _load(own)
        function: Any = importlib.import_module(module_name)
        for part in function_name.split("."):
            function = getattr(function, part)
    except (Exception, SystemExit) as error:  # a stranger's module may raise anything when it is imported
        raise ValueError(
            f"reward.name: can't import {name!r}: {type(error).__name__}: {_told(str, error)}; expected "
            "package.module:function in the current folder or on the Python path"
        ) from error
    if kind := _other_kind(function):
        raise ValueError(
            f"reward.name: {name!r} {kind}, expected a function (response, answer), which gets both by position"
        )
    return cast(Reward, function)


def _other_kind(function: Any) -> str | None:
    """What a thing is that is no function of a response and an answer, in words; None where it may be one."""
    if isinstance(function, type) or not callable(function):
        return "is a class" if isinstance(function, type) else f"is {type(function).__name__}"
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        return "is async"
    try:
        signature = inspect.signature(function, follow_wrapped=False)  # of what is called, not of what it wraps
    except (TypeError, ValueError):  # written in C, it has none
        return None
    try:
        signature.bind("", "")
    except TypeError:
        return f"takes {signature}"
    return f"takes {signature}" if list(signature.parameters)[:2] == ["answer", "response"] else None


def _load(spec: ModuleSpec) -> None:
    """Import a module from where it was found, which the Python path may have another for."""
    assert spec.loader is not None
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
