"""Whether a score's course over compute can be extrapolated: laws fitted to its first half, held against the second.

The first half has the points up to half of the largest compute. The second is cut into ten equal parts of compute, and
the mean of the points of each part is what a law has to predict. The law that comes nearest is the curve's; it
extrapolates where `NEEDED` of those means are within a tolerance, unless the scores' own change hides in that.
Asymptote and exponent are those of all points, and are refused, in words, where the points can't tell them.

Real curves are no sigmoids, and a profile likelihood believes the law. So the asymptote's interval also holds those of
the first half and of the points from `LATER` of the compute on, where the rise does not set the law; it is refused
where either of these can't tell it, and where the sigmoid of the first half misses the second for no noise: then it is
not the curve's law. Measured: tests/benchmarks/tabular_scaling.py.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Literal

import numpy as np

from astar_megatron.studies.laws import CONSTANT, LAWS, SIGMOID, Fit, Interval, Law, Points, fit
from astar_megatron.studies.spread import LEVEL

NEEDED = 0.9
EARLIER, LATER = 0.5, 0.25  # of the largest compute: up to there, and from there on
_PARTS, _LEAST_PARTS = 10, 3
_LARGE = 0.2  # an error, of how far the scores of a run span, and of the tolerance
_NO_CHANGE = "a constant fits as well, within the noise: more compute, more seeds or more prompts"
_RUNS_DIFFER = "runs differ by more than tells it: more runs, as long as the longest"

type Verdict = Literal["extrapolates", "does not", "can't be told"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """A fitted number with its interval, or in words why the points can't tell it."""

    value: float
    interval: Interval | None = None
    refusal: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LawResult:
    """What a law gave; `refusal` is why it could not be fitted to the first half or to all points."""

    law: str
    numbers: Mapping[str, Number]  # of the fit to all points
    refusal: str | None
    error: float | None  # root mean square of prediction less late mean
    share: float | None  # of the late means that are within the tolerance of the prediction
    whole: Fit | None
    early: Fit | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Late:
    """The means of the second half: compute [k], score [k], and of how many points [k] each is."""

    compute: np.ndarray
    score: np.ndarray
    count: np.ndarray

    def rows(self) -> list[tuple[float, float, int]]:
        """Return compute, score and number of each."""
        return list(zip(self.compute.tolist(), self.score.tolist(), self.count.tolist(), strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Extrapolation:
    """What is known of a curve."""

    name: str
    points: Points
    split: float  # the compute up to which the first half goes
    late: Late
    laws: Sequence[LawResult]
    best: LawResult | None  # the nearest to the late means
    verdict: Verdict
    reason: str


def extrapolate(name: str, points: Points, tolerance: float, lost_at_end: int = 0) -> Extrapolation:
    """Fit all laws to a curve and judge them; of rows of lost scores after its last points nothing can be told."""
    split = float(points.compute.max(initial=0.0)) / 2
    late = _late(points, split)
    laws = [_result(law, points, points.where(points.compute <= split), late, tolerance) for law in LAWS]
    fitted = (law for law in reversed(laws) if law.error is not None)  # of equals the first: the fewest numbers
    unit = _unit(points.score)
    best = min(fitted, key=lambda law: round((law.error or 0.0) / unit, 6), default=None)
    verdict, reason = _verdict(best, laws, late, split, tolerance)
    span = _span_of_runs(points)
    if verdict == "extrapolates" and best and (best.error or 0.0) > max(_noise(late), _LARGE * max(span, tolerance)):
        verdict = "can't be told"
        reason += f", but misses them by {best.error:.3g}, above their noise, where scores of a run span {span:.3g}: "
        reason += "lower --tolerance"
    if not len(points):
        reason = "no row has a score"
    if lost_at_end and verdict == "extrapolates":
        verdict, reason = "can't be told", f"{reason}, but it ends in {lost_at_end} rows without a score"
    if points.score.max(initial=0.0) > 1:
        reason += "; scores look like per cent, --tolerance is in their unit"
    return Extrapolation(
        name=name, points=points, split=split, late=late, laws=laws, best=best, verdict=verdict, reason=reason
    )


def sigmoid_numbers(whole: Fit, constant: Fit, span: float) -> dict[str, Number]:
    """Return the numbers of a sigmoid fitted to points whose scores span so much; refuse those that these can't tell.

    An asymptote, or a start, whose interval is wider than all scores span is refused too.
    """
    start, start_interval = whole.coefficient(0)
    asymptote, interval = whole.coefficient(1)
    log_exponent, (low, high) = whole.shape("row")
    log_middle, (near, far) = whole.shape("column")
    numbers = {
        "asymptote": Number(value=asymptote, interval=interval),
        "exponent": Number(value=math.exp(log_exponent), interval=(math.exp(low), math.exp(high))),
        "middle": Number(value=_exp(log_middle + whole.centre), interval=_exps(near, far, whole.centre)),
        "start": Number(value=start, interval=start_interval),
    }
    if span == 0 or constant.squares.min() <= whole.limit:
        refusals = dict.fromkeys(numbers, _NO_CHANGE)
    else:
        refusals = dict.fromkeys(_untold(whole, span), _RUNS_DIFFER) | _untold(whole.if_runs_agree(), span)
    return {
        name: replace(number, interval=None, refusal=refusals[name]) if name in refusals else number
        for name, number in numbers.items()
    }


def _untold(whole: Fit, span: float) -> dict[str, str]:
    """Which numbers of a sigmoid have intervals that tell nothing, and why."""
    (start, start_interval), (asymptote, interval) = whole.coefficient(0), whole.coefficient(1)
    (low, high), (near, far) = (whole.shape(axis)[1] for axis in ("row", "column"))
    refusals = {}
    if math.isinf(far) or math.isinf(low) or interval[1] - interval[0] > span:
        words = "the scores have not levelled off, and any from {:.3g} on fits: more compute"
        refusals["asymptote"] = words.format(interval[0] if asymptote >= start else interval[1])
        refusals["middle"] = "the scores have not levelled off: more compute"
    if start_interval[1] - start_interval[0] > span:
        refusals["start"] = "too few points lie before the rise: evaluate earlier"
    if math.isinf(near):
        refusals["start"] = refusals["middle"] = "there is no point before the rise: evaluate earlier"
    if math.isinf(low) or math.isinf(high):
        slow_or_sudden = "as slow" if math.isinf(low) else "as sudden"
        refusals["exponent"] = f"a rise {slow_or_sudden} as can be fits: more points where the scores change"
    return refusals


def _numbers(whole: Fit, points: Points) -> dict[str, Number]:
    match whole.law.name:
        case "sigmoid":
            numbers = sigmoid_numbers(whole, fit(CONSTANT, points), float(np.ptp(points.score)))
            return numbers | {"asymptote": _of_parts(numbers["asymptote"], points)}
        case "log-linear":
            value, interval = whole.shape("column")
            return {"exponent": Number(value=value, interval=interval)}
        case _:
            value, interval = whole.coefficient(0)
            return {"asymptote": Number(value=value, interval=interval)}


def _of_parts(asymptote: Number, points: Points) -> Number:
    """The asymptote with an interval that holds those of parts of the curve too, or refused where these can't tell."""
    share = points.compute / points.compute.max()
    parts = {
        f"up to {EARLIER:.0%} of the compute": share <= EARLIER,
        f"from {LATER:.0%} of the compute on": share >= LATER,
    }
    for name, inside in parts.items():
        if asymptote.interval is None:
            return asymptote
        own = _of_part(points.where(inside), float(np.ptp(points.score)))
        if own.interval is None:
            asymptote = replace(asymptote, interval=None, refusal=f"of the points {name}: {own.refusal}")
        else:
            low, high = zip(asymptote.interval, own.interval, strict=True)
            asymptote = replace(asymptote, interval=(min(low), max(high)))
    return asymptote


def _of_part(points: Points, span: float) -> Number:
    """The asymptote of some points; where a constant fits as well, that."""
    try:
        whole, constant = fit(SIGMOID, points), fit(CONSTANT, points)
    except ValueError as reason:
        return Number(value=math.nan, refusal=str(reason))
    if constant.squares.min() <= whole.limit:
        value, interval = constant.coefficient(0)
        return Number(value=value, interval=interval)
    return sigmoid_numbers(whole, constant, span)["asymptote"]


def _span_of_runs(points: Points) -> float:
    """Return how far the scores of a run span, at most."""
    return max((float(np.ptp(points.score[points.run == run])) for run in np.unique(points.run)), default=0.0)


def _unit(score: np.ndarray) -> float:
    """Return what errors are compared in: how far scores span, or how large they are where they do not change."""
    most = float(np.abs(score).max(initial=0.0))
    span = float(np.ptp(score)) if len(score) else 0.0
    return span if span > 1e-7 * most else most or 1.0


def _late(points: Points, split: float) -> Late:
    place = np.round((points.compute / (split or 1.0) - 1) * _PARTS, 9)  # a bound belongs to the part below it
    part = np.maximum(0, np.ceil(place))  # 0: of the first half
    parts = [part == number for number in range(1, _PARTS + 1) if (part == number).any()]
    return Late(
        compute=np.array([points.compute[inside].mean() for inside in parts]),
        score=np.array([points.score[inside].mean() for inside in parts]),
        count=np.array([inside.sum() for inside in parts]),
    )


def _result(law: Law, points: Points, first_half: Points, late: Late, tolerance: float) -> LawResult:
    whole = early = error = share = refusal = None
    try:
        whole = fit(law, points)
        early = fit(law, first_half)
        difference = np.abs(early.score(late.compute) - late.score)
        if len(difference):
            error, share = float(np.sqrt((difference**2).mean())), float((difference <= tolerance).mean())
    except ValueError as reason:
        half = "" if whole is None else f", up to half of the compute, where there are {len(first_half)}"
        refusal = f"{reason}{half}"
    numbers = _numbers(whole, points) if whole else {}
    is_missed = error is not None and share is not None and _is_missed(error, share, late)
    if law is SIGMOID and is_missed and not numbers["asymptote"].refusal:
        words = (
            f"fitted up to {EARLIER:.0%} of the compute the sigmoid misses the later means, by more than their noise"
        )
        numbers["asymptote"] = replace(numbers["asymptote"], interval=None, refusal=words)
    return LawResult(
        law=law.name,
        numbers=numbers,
        refusal=refusal,
        error=error,
        share=share,
        whole=whole,
        early=early,
    )


def _verdict(
    best: LawResult | None, laws: Sequence[LawResult], late: Late, split: float, tolerance: float
) -> tuple[Verdict, str]:
    if best is None or best.error is None or best.share is None:
        return "can't be told", "; ".join(law.refusal for law in laws if law.refusal) or "no point after the first half"
    parts = len(late.score)
    if parts < _LEAST_PARTS:
        return "can't be told", f"of ten parts of the second half {parts} have points: evaluate oftener"
    words = f"{best.law}, fitted up to {split:.3g}, is within {tolerance:g} of {best.share:.0%} of {parts} later means"
    if best.share >= NEEDED:
        return "extrapolates", words
    words += f": its error is {best.error:.3g}; from one to the next they move by ± {_noise(late):.3g}"
    return "does not", words if _is_missed(best.error, best.share, late) else f"{words}: more seeds or more prompts"


def _is_missed(error: float, share: float, late: Late) -> bool:
    """Whether a law misses the late means by more than their noise."""
    return share < NEEDED and len(late.score) >= _LEAST_PARTS and error > _noise(late)


def _noise(late: Late) -> float:
    """Half of the 95 % interval of a late mean, by how far each lies from the middle of its two neighbours.

    Half of these distances are below 0.6745 sqrt(6) / 2 standard errors, whatever law the means follow. What all means
    share, as that a score is of these problems and no others, is not in it.
    """
    distance = np.abs(late.score[1:-1] - (late.score[:-2] + late.score[2:]) / 2)
    error = float(np.median(distance)) / (NormalDist().inv_cdf(0.75) * math.sqrt(1.5))
    return NormalDist().inv_cdf((1 + LEVEL) / 2) * error


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))


def _exps(low: float, high: float, centre: float) -> Interval:
    return _exp(low + centre), _exp(high + centre)
