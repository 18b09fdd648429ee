"""Configuration files as trees of plain values: YAML, one `base:` level below, `key=value` overrides above.

And the words in which a tree is refused. Leaves out what the keys mean: config.py.
"""

import datetime
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from astar_megatron.config_secrets import LOGIN_REFUSED, has_login, without_logins

_MOST_WHOLE = 10**15  # far from what 64 bits hold
# As $HOME and ${HOME}. The one exception is a user's name, of NVIDIA's registry of images.
NAMES_VARIABLE = re.compile(r"\$\{?(?!oauthtoken@)[A-Za-z_]")
# What JSON may have as it stands, and YAML reads as a line's end, or not at all.
_ESCAPED_FOR_YAML = re.compile("[\x7f-\xa0\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")
_LEAST, _MOST = 1e-30, 1e30  # far from what float32 rounds to 0 or to infinity


def _as_it_stands(value: str) -> str:
    if value.startswith("~"):
        raise PydanticCustomError("home", "a path without ~, which only a shell replaces: write it out")
    if NAMES_VARIABLE.search(value):
        raise PydanticCustomError(
            "variable", "a text without variables of a shell, which nobody replaces here: write it out"
        )
    return value


Name = Annotated[str, Field(min_length=1), AfterValidator(_as_it_stands)]  # a path or an address
Seconds = Annotated[float, Field(gt=0.0, le=1e6)]  # of waiting: the system's own waits end at 2**31 milliseconds


class Section(BaseModel):
    """Keys that belong together, with their values."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        hide_input_in_errors=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _without_login(cls, value: Any) -> Any:
        """Refuse a login before anything else is said of the value."""
        if any(isinstance(text, str) and has_login(text) for text in (value if isinstance(value, list) else [value])):
            raise PydanticCustomError("login", LOGIN_REFUSED)
        return value

    @field_validator("*")
    @classmethod
    def _within_reach(cls, value: Any) -> Any:
        """Refuse what is of the right type and yet nothing that can be computed with, or written."""
        if type(value) is int and value > _MOST_WHOLE:
            raise PydanticCustomError("range", "input should be at most 10^15")
        if type(value) is float and value and not _LEAST <= abs(value) <= _MOST:
            raise PydanticCustomError("range", "input should be 0, or from 1e-30 to 1e30")
        if isinstance(value, str) and "\0" in value:  # no file's name has it
            raise PydanticCustomError("text", "input should be text without NUL")
        return value


class ConfigError(ValueError):
    """A configuration that can't run; the message names the key, what it holds and what would do."""


def read(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the tree of a YAML file, its base and `a.b=value` overrides (values are read as YAML).

    Raises ConfigError naming the file, or the override, and the place in it.
    """
    tree = _read_yaml(Path(path))
    if "base" in tree:
        base = tree.pop("base")
        if not isinstance(base, str) or not base:
            raise ConfigError(f"base: expected a file name beside {path}, got {base!r}")
        below = _read_yaml(Path(path).parent / base)
        if "base" in below:
            raise ConfigError(f"base: {base} has a base of its own; one level is allowed, merge the two files")
        tree = _merge(below, tree)
    for override in overrides:
        tree = _merge(tree, _parse_override(override))
    return tree


def with_values(tree: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tree with values at key paths, `{"optim.lr": 1e-6}`, above what it holds. Raises ConfigError."""
    for key, value in values.items():
        tree = _merge(tree, _at(key, value))
    return dict(tree)


def as_json(tree: Mapping[str, Any]) -> str:
    """Return a tree as JSON that `read` reads as the same.

    Characters stand as they are where YAML lets them: JSON escapes an emoji as a pair, of which YAML reads two halves.
    """
    text = json.dumps(tree, indent=1, ensure_ascii=False) + "\n"
    return _ESCAPED_FOR_YAML.sub(lambda character: f"\\u{ord(character[0]):04x}", text)


_TAGS_OF_KEYS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "merge", "value")}


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads numbers as YAML 1.2 does: PyYAML follows 1.1, where 1e-5 is text, 010 is 8 and 1:30 is 90.

    It refuses a key that stands twice, of which PyYAML would take the last in silence, and one that is no text.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 (as PyYAML has it)
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":int", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key that is no text", problem_mark=key.start_mark)
            if key.tag not in _TAGS_OF_KEYS:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} needs quotes: YAML reads on, off, yes, no as true and false, and "
                    "numbers, days and null as such",
                    problem_mark=key.start_mark,
                )
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _date_or_text(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    """A date, or the text of what looks like one and is none (2026-02-30): its key says what it expects."""
    try:
        return loader.construct_yaml_timestamp(node)
    except ValueError:
        return loader.construct_yaml_str(node)


_Loader.add_constructor("tag:yaml.org,2002:timestamp", _date_or_text)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][\d_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?((\d[\d_]*\.\d*|\.\d+|\d[\d_]*(?=[eE]))([eE][-+]?\d+)?|\.inf)$|^\.nan$", re.IGNORECASE),
    list("-+.0123456789"),
)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file; the ones that ship are in configs/") from None
    except OSError as error:
        raise ConfigError(f"{path}: can't read the configuration: {error.strerror}; name a YAML file") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not readable as YAML in UTF-8: {_reason(error)}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not readable as YAML: brackets in brackets without end; repair the file") from None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: expected a mapping of keys to values, got {'nothing' if tree is None else type(tree).__name__}; "
            "the configurations that ship are in configs/"
        )
    return tree


def _reason(error: Exception) -> str:
    """What a reader of YAML says, without the text around that place, which may be a part of a password."""
    if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark):
        words = ", ".join(filter(None, (error.context, error.problem)))
        return f"{words}, line {mark.line + 1}, column {mark.column + 1}"
    return str(error)


_QUOTE = """put it into quotes of its own, as --set 'data.suffix=" ####"'"""


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"--set {text}: expected key=value, for example --set optim.lr=1e-6")
    try:
        tree: Any = yaml.load(value, Loader=_Loader)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(
            f"--set {text:.200}: the value is not readable as YAML: {_reason(error)}; if it is a text, {_QUOTE}"
        ) from None
    if _has_comment(value):
        raise ConfigError(
            f"--set {text:.200}: YAML takes # and what follows for a comment; {_QUOTE}, or leave the comment out"
        )
    if isinstance(tree, str) and tree != value and not value.lstrip().startswith(('"', "'")):
        raise ConfigError(f"--set {text:.200}: YAML would read the text {tree!r:.200}; {_QUOTE}")
    return _at(key.strip(), tree)


def _has_comment(text: str) -> bool:
    """Whether there is a comment between what YAML reads in a text."""
    end = 0
    for token in yaml.scan(text, Loader=_Loader):
        if "#" in text[end : token.start_mark.index]:
            return True
        end = token.end_mark.index
    return False


def _at(key: str, value: Any) -> dict[str, Any]:
    """The tree in which a key path has a value."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def day(value: Any) -> str:
    """Return a day as its text; YAML reads 2026-11-28 as a date. Raises ValueError."""
    try:
        text = value.isoformat() if type(value) is datetime.date else value
        return datetime.datetime.strptime(text, "%Y-%m-%d").date().isoformat()
    except (TypeError, ValueError):
        raise ValueError(f"data.date: expected a day as 2026-11-28, got {value!r}") from None


def nearest_divisor(number: int, wanted: int) -> int:
    """Return the divisor of `number` that is nearest to `wanted`."""
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - wanted))


def explain(problem: Any, keys: Sequence[str]) -> str:
    """Return in a line what pydantic found wrong with a tree, and what would do; `keys` are all there are."""
    path = ".".join(str(part) for part in problem["loc"])
    shown = problem["type"] not in ("missing", "value_error", "login")
    got = f", got {without_logins(repr(problem['input'])):.200}" if shown else ""
    if problem["type"] == "extra_forbidden":
        section = path.rpartition(".")[0]
        siblings = [key.rpartition(".")[2] for key in keys if key.rpartition(".")[0] == section]
        known = f"; {section} has {', '.join(siblings)}" if section and siblings else ""
        below = next(iter(problem["input"]), "") if isinstance(problem["input"], dict) else ""
        nearest = _nearest_key(f"{path}.{below}" if below else path, keys)
        if "." in str(problem["loc"][-1]) and "." in nearest:  # as --set has it
            above, _, leaf = nearest.rpartition(".")
            return f"{path}: in a file keys are nested; write `{above}:` and, indented below it, `{leaf}:`"
        return f"{path}: no such key; the nearest is {nearest}{known}"
    if problem["type"] == "missing":
        return f"{path}: this key is required"
    if problem["type"] == "model_type":
        first = next(key for key in keys if key.startswith(f"{path}."))
        return f"{path}: expected keys with values below it, for example {first}{got}; leave it out if it has none"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    return f"{path}: {problem['msg'][0].lower()}{problem['msg'][1:]}{got}"


def _nearest_key(path: str, keys: Sequence[str]) -> str:
    """Return the key most like `path`: the same name in any section, its initials (learning_rate: lr), or alike."""
    section, _, leaf = path.rpartition(".")
    leaves = {key: key.rpartition(".")[2] for key in keys}
    initials = f"{section}.{''.join(word[:1] for word in leaf.split('_'))}"
    if initials in leaves:
        return initials
    alike = difflib.get_close_matches(leaf, leaves.values(), n=1)
    candidates = [key for key in keys if key.startswith(f"{leaf}.")]  # it is the name of a section
    candidates = candidates or [key for key, name in leaves.items() if not alike or name == alike[0]]
    return difflib.get_close_matches(path, candidates, n=1, cutoff=0.0)[0]
