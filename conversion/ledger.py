"""What goes by in a conversion: digests of every parameter, beside those that a folder's conversion.json records.

A digest is entered part by part, in any order and from any thread; see `verify`.
"""

from collections import Counter
from threading import Lock
from typing import Any

from torch import Tensor

from conversion.ends import End
from conversion.families import contrast
from conversion.folders import RECORD, ModelFolderError, first_few, model_name, read_record
from conversion.plan import Rectangle
from conversion.tiles import Span
from conversion.verify import DIGEST_RULE, digest


class Ledger:
    """The digests of what was read of `end`, and which parameters hold NaN or Inf. From any thread."""

    def __init__(self, end: End) -> None:
        self.end, self._lock = end, Lock()
        self._digests: Counter[str] = Counter()
        self.bad: Counter[str] = Counter()  # values that are not finite, by parameter

    def enter(self, name: str, rectangle: Rectangle, values: Tensor) -> None:
        """Count in a part of a parameter; all of them, once each, are the whole."""
        bad, part_digest = num_not_finite(values), digest(values, rectangle)
        with self._lock:
            self._digests[name] += part_digest
            if bad:
                self.bad[name] += bad

    def read(self, name: str, rows: Span) -> Tensor:
        """Return whole rows of a parameter of the folder, counted in."""
        values = self.end.rows(name, *rows)
        self.enter(name, (*rows, 0, values.shape[1] if values.dim() > 1 else 1), values)
        return values

    def digests(self) -> dict[str, str]:
        """Return the digest of each parameter, as conversion.json holds them."""
        return {name: f"{self._digests[name] % (1 << 64):016x}" for name in self.end.model.parameters()}

    def check(self) -> None:
        """Raise ModelFolderError where a weight is not finite, or is not what the folder's own record says."""
        if self.bad:
            raise ModelFolderError(f"{self.end.path}: {listed(self.bad)}: such a model computes nothing; not converted")
        if wrong := differing(recorded(self.end), self.digests()):
            raise ModelFolderError(
                f"{self.end.path}: {first_few(wrong)}: not what {RECORD} there records, so the folder is damaged or "
                f"was changed: take it from a copy, or, if it was changed on purpose, remove {RECORD}"
            )

    def record(self) -> dict[str, Any]:
        """Return what stands in conversion.json of a folder made of this one."""
        layout, like = self.end.layout(), self.end.companions
        return (
            {
                "source": model_name(self.end.path),
                "source_kind": self.end.kind,
                "dtype": str(self.end.dtype).removeprefix("torch."),
                "config": self.end.model.computation(),
                "digest_rule": DIGEST_RULE,
                "digests": self.digests(),
                "logprobs": {"max_difference": None, "reason": "nobody has compared them yet: see digests"},
            }
            | ({} if layout is None else {"layout": layout})
            | ({} if like == self.end.path else {"like": model_name(like)})
        )


def recorded(end: End) -> dict[str, str]:
    """Return the digests that the folder's conversion.json holds, none if it has none. ModelFolderError: no such thing.

    Digests are of the bits of one type: a record of another type is not of these weights.
    """
    record = read_record(end.path) or {}
    digests, dtype = record.get("digests") or {}, str(end.dtype).removeprefix("torch.")
    if not isinstance(digests, dict):
        raise ModelFolderError(f"{end.path / RECORD}: digests are no JSON object: remove it if the weights are sound")
    if digests and (rule := record.get("digest_rule")) != DIGEST_RULE:
        raise ModelFolderError(
            f"{end.path / RECORD}: its digests are by the rule {rule!r}, expected {DIGEST_RULE!r}: remove it if the "
            "weights are sound"
        )
    if digests and record.get("dtype") != dtype:
        raise ModelFolderError(
            f"{end.path / RECORD} is of weights in {record.get('dtype')}, these are in {dtype}: if they were changed "
            "on purpose, remove it"
        )
    return digests


def check_record(end: End) -> None:
    """Raise ModelFolderError where the folder's conversion.json can't be of these weights, or of its config.json."""
    recorded(end)
    _check_config(end)


def _check_config(end: End) -> None:
    """Raise ModelFolderError where config.json computes otherwise than the folder's conversion.json records.

    The weights alone do not say what a model computes: another epsilon or rotary base has the same digests.
    """
    config, file = (read_record(end.path) or {}).get("config"), end.companions / "config.json"
    if config is None:
        return
    if not isinstance(config, dict):
        raise ModelFolderError(f"{end.path / RECORD}: config is no JSON object: remove it if config.json is right")
    if difference := contrast(config, end.model.computation()):
        raise ModelFolderError(
            f"{end.path / RECORD} records another computation than {file} says: {difference}: restore config.json, or, "
            f"if it was changed on purpose, remove {RECORD}"
        )


def differing(expected: dict[str, str], actual: dict[str, str]) -> list[str]:
    """Return the parameters whose digests are not the expected ones; none where nothing is expected."""
    return [name for name in sorted({*expected, *actual}) if expected and expected.get(name) != actual.get(name)]


def num_not_finite(values: Tensor) -> int:
    """Return how many elements are NaN or infinite."""
    if not values.numel() or all(bool(end.isfinite()) for end in values.aminmax()):  # 50 times as fast as isfinite
        return 0
    return int((~values.isfinite()).sum())


def listed(bad: Counter[str]) -> str:
    """Return in words which parameters hold values that are not finite."""
    return f"NaN or Inf in {first_few([f'{name} ({count} values)' for name, count in sorted(bad.items()) if count])}"


def doubt(end: End, digests: dict[str, str]) -> str:
    """Return in words why a folder may not be the model that its record is of; "" where nothing says so."""
    try:
        _check_config(end)
    except ModelFolderError as error:
        return str(error)
    return _weights_doubt(end, digests)


def weights_verdict(end: End, digests: dict[str, str]) -> str:
    """Return in words whether the folder's record says what was found in it."""
    return _weights_doubt(end, digests) or f"as recorded in {RECORD}"


def _weights_doubt(end: End, digests: dict[str, str]) -> str:
    try:
        expected = recorded(end)
    except ModelFolderError as error:
        return str(error)
    if not expected:
        return f"nothing records what the weights should be (no digests in {RECORD})"
    wrong = differing(expected, digests)
    return f"not as recorded in {RECORD}: {first_few(wrong)}" if wrong else ""


def config_verdict(end: End) -> str:
    """Return in words whether the folder's config.json computes what its record says."""
    try:
        _check_config(end)
        has_config = (read_record(end.path) or {}).get("config") is not None
    except ModelFolderError as error:
        return str(error)
    if not has_config:
        return f"nothing records what config.json should say (no config in {RECORD})"
    return f"config.json computes as recorded in {RECORD}"
