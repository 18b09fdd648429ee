"""How far points lie around a fitted curve, and how far runs lie from each other: what intervals are made of.

A sum of squares may be above the least by W d t^2 / (n - q), for n points and q numbers, those of the law and the
levels of the runs but one. W is the sum of squares within runs: of the best curve's residuals less the mean of their
run. t is Student's quantile of n / d - q. d, at least 1, says that points of a run move together: it is 1 + twice the
sum of the autocorrelations within runs, or, where that is more, (1 + r) / (1 - r), that of an autoregression with the
first of them, r. A fit takes a part of r away: it gets (1 + q) (1 + r) / n.

Runs differ in level and in shape, and some are longer. So each in turn is left out of the fit, to first order in the
law's numbers. Where the jackknife's variance of a number, or of the curve at some compute, is V times what the points
within runs explain, and V above 1, an interval's ends move away by the root of V; the freedom of t is Satterthwaite's.
Few runs may lie closer together than they do as a rule: of R runs V counts for 1 + 1 / (R - 1)^2 at least.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

LEVEL = 0.95
_MOST_TOGETHER = 0.95  # correlation of a point with the one before it that few points can tell from 1
_SHARE_WITHIN = 1e-8  # of the squares are at least within runs: how far runs differ is told beside that
_SINGULAR = 1e-10  # of the square of a slope's norm: that much is known of a number that the runs left do not tell


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How far points lie around the best curve, and runs from each other."""

    room: float  # by how much a sum of squares may be above the least, within LEVEL
    freedom: float  # of the points within runs
    of_points: np.ndarray  # [k, k]: covariance of the law's numbers by how points lie around their run
    of_runs: np.ndarray  # [k, k]: the same by the jackknife over runs; 0 of a single run
    runs: int
    dependence: float  # d

    def wider(self, value: np.ndarray | float, ends: np.ndarray, slope: np.ndarray) -> np.ndarray:
        """Return ends around a value, [2] or [2, n], that allow for what runs differ by; `ends` are without it.

        `slope`, [k] or [n, k], is by how much the law's numbers move the value.
        """
        of_points, of_runs = (((slope @ each) * slope).sum(-1) for each in (self.of_points, self.of_runs))
        others = max(1, self.runs - 1)
        least = 0.0 if self.runs == 1 else 1 / others**2
        # V - 1; of a number that the law does not have both are 0
        more = np.maximum(least, np.divide(of_runs, of_points, out=np.ones_like(of_runs), where=of_points > 0) - 1)
        freedom = (1 + more) ** 2 / (1 / self.freedom + more**2 / others)
        return value + (ends - value) * np.sqrt(1 + more) * student(freedom) / student(self.freedom)


def spread_of(residuals: np.ndarray, slopes: np.ndarray, compute: np.ndarray, run: np.ndarray, numbers: int) -> Spread:
    """Return that of residuals [n] of runs [n] around the best curve, whose law has so many numbers.

    `slopes` [n, k] is by how much the numbers move the curve. Runs with fewer points than numbers can't tell their
    level: all points count as one run's.
    """
    names, run = np.unique(run, return_inverse=True)
    if len(residuals) < len(names) * (numbers + 1):
        names, run = names[:1], np.zeros(len(residuals), int)
    runs = len(names)
    level = np.bincount(run, residuals) / np.bincount(run)
    within = residuals - (level[run] if runs > 1 else 0.0)
    numbers += runs - 1
    dependence = _dependence(within, compute, run, numbers)
    freedom = max(1.0, len(residuals) / dependence - numbers)
    squares = max(float((within**2).sum()), _SHARE_WITHIN * float((residuals**2).sum()))
    variance = dependence * squares / (len(residuals) - numbers)
    of_points, of_runs = _covariances(residuals, slopes, run, variance)
    return Spread(
        room=variance * float(student(freedom)) ** 2,
        freedom=freedom,
        of_points=of_points,
        of_runs=of_runs,
        runs=runs,
        dependence=dependence,
    )


def _covariances(
    residuals: np.ndarray, slopes: np.ndarray, run: np.ndarray, variance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Those [k, k] of the numbers by points that vary by so much, and by the jackknife over runs."""
    runs, count = int(run.max()) + 1, slopes.shape[1]
    norm = np.sqrt((slopes**2).sum(0))
    norm[norm == 0] = 1.0  # of a number that the law does not have
    slopes = slopes / norm
    moment = slopes.T @ slopes + _SINGULAR * np.eye(count)
    of_points = variance * np.linalg.inv(moment) / np.outer(norm, norm)
    if runs == 1:
        return of_points, np.zeros_like(of_points)
    without = np.stack([moment - slopes[run == left_out].T @ slopes[run == left_out] for left_out in range(runs)])
    moment_of_run = np.stack([slopes[run == left_out].T @ residuals[run == left_out] for left_out in range(runs)])
    moved = np.linalg.solve(without, moment_of_run[..., None])[..., 0] / norm
    return of_points, (runs - 1) / runs * moved.T @ moved


def _dependence(residuals: np.ndarray, compute: np.ndarray, run: np.ndarray, numbers: int) -> float:
    """d: residuals [n] in order of compute within each run; autocorrelations count until the first that is noise."""
    order = np.lexsort((compute, run))
    residuals, run = residuals[order], run[order]
    total, dependence, of_autoregression = float((residuals**2).sum()), 1.0, 1.0
    for lag in range(1, len(residuals)):
        together = run[lag:] == run[:-lag]
        pairs = int(together.sum())
        if pairs < 2 or total == 0:
            break
        correlation = float((residuals[lag:] * residuals[:-lag])[together].sum()) / pairs / (total / len(residuals))
        if correlation < 2 / math.sqrt(pairs):
            break
        if lag == 1:
            first = min(_MOST_TOGETHER, correlation + (1 + numbers) * (1 + correlation) / len(residuals))
            of_autoregression = (1 + first) / (1 - first)
        dependence += 2 * correlation * pairs / len(residuals)
    return max(dependence, of_autoregression)


def student(freedom: np.ndarray | float) -> np.ndarray:
    """Return t so that Student's t with so many degrees of freedom lies within -t and t in LEVEL of cases.

    The series is that of Abramowitz and Stegun, 26.7.5. Below 3, where it is poor, that of 1 or 2: these are exact.
    """
    chance, z = 1 - LEVEL, NormalDist().inv_cdf((1 + LEVEL) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    freedom = np.maximum(1.0, freedom)
    series = z + sum(term / freedom**power for power, term in enumerate(terms, 1))
    exact = 1 / math.tan(chance * math.pi / 2), math.sqrt(2 / (chance * (2 - chance)) - 2)
    return np.where(freedom < 2, exact[0], np.where(freedom < 3, exact[1], series))
