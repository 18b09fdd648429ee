"""Three laws of a score R against compute C, fitted by least squares, with profile-likelihood intervals.

- sigmoid: R = R_0 + (A - R_0) / (1 + (C_mid / C)^B)   arXiv 2510.13786, with R_0 fitted too
- log-linear: ln(1 - R) = E - k ln C                   arXiv 2509.25300: the loss 1 - R is a power of compute
- constant: R = A

Each is linear in some numbers (R_0 and A; e^E; A) once its shape (ln B and ln C_mid; k) is given. So the sum of squares
is computed on a grid of shapes, made finer around its least: no start values, the same result each time.

An interval holds every value that some shape reaches with a sum of squares below min + W d t^2 / (n - q), for n points
and q numbers, those of the law and the levels of the runs but one. W is the sum of squares within runs: of the best
shape's residuals less the mean of their run. t is Student's quantile of n / d - q. d, at least 1, says that points of a
run move together: it is 1 + twice the sum of the autocorrelations within runs, or, where that is more, (1 + r) / (1 -
r), that of an autoregression with the first of them, r. A fit takes a part of r away: it gets (1 + q) (1 + r) / n. Runs
differ in level, by more than their points explain: the variance of their mean is added to that of an asymptote, or of
the curve, and the freedom of t is Satterthwaite's.

Leaves out what is concluded from a fit, or refused: extrapolation.py.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

LEVEL = 0.95
_EXPONENTS = (math.log(0.1), math.log(20.0))  # of the sigmoid, which is a step from there on
_FAR = (math.log(30.0), math.log(1000.0))  # C_mid: so far below the least compute, and above the most
_CELLS = 31  # of the grid along each axis
# How often the grid is made finer, around its least and around all within the limit, and whether along both axes.
_TO_LEAST, _TO_LIMIT = (False, False, True, False) * 4, (False, False, True, False, True, False)
_MOST_TOGETHER = 0.95  # correlation of a point with the one before it that few points can tell from 1
_MANY = 240  # points, from which on the rows of a grid are solved one by one: all at once are slower, and need memory
_TINY = 1e-9  # of the number of points: where a shape does not tell two coefficients apart, any will do

type Interval = tuple[float, float]  # an end is infinite where the points set none


@dataclass(frozen=True, slots=True)
class Points:
    """Scores [n] at compute [n] of 0 or more, in any one unit; run [n] int says which are of one run."""

    compute: np.ndarray
    score: np.ndarray
    run: np.ndarray

    def where(self, chosen: np.ndarray) -> "Points":
        """Return some of them; `chosen` is [n] bool."""
        return Points(self.compute[chosen], self.score[chosen], self.run[chosen])

    def __len__(self) -> int:
        return len(self.score)


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """A family of curves: `basis(log_compute [n], row [S], column [S])` is [S, n, m], and m coefficients go with it.

    Rows and columns are the axes of the grid of shapes: `rows` has the ends of one, `columns` those of the other by the
    least and the most log compute. `numbers` is how many are fitted, `is_loss` whether they give 1 - R.
    """

    name: str
    numbers: int
    rows: Interval
    columns: Callable[[float, float], Interval]
    basis: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    is_loss: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How far points lie around the best curve, and runs from each other."""

    room: float  # by how much a sum of squares may be above the least, within LEVEL
    freedom: float  # of the points within runs
    between: float  # variance of the mean of the runs' levels, less what their points explain; 0 of a single run
    runs: int
    dependence: float  # d

    def wider(self, value: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Return ends around a value, [2] or [2, n], that allow for what runs differ by; `ends` are without it."""
        if not self.between:
            return ends
        points = (ends - value) ** 2 / float(student(self.freedom)) ** 2
        freedom = (points + self.between) ** 2 / (points**2 / self.freedom + self.between**2 / (self.runs - 1))
        reach = student(freedom) * np.sqrt(points + self.between)
        return np.stack([value - reach[0], value + reach[1]])


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A law fitted to points: shapes [G] around the best, which is the last, with what goes with each."""

    law: Law
    centre: float  # what is subtracted from ln C
    row: np.ndarray
    column: np.ndarray
    squares: np.ndarray  # [G]
    coefficients: np.ndarray  # [G, m]
    inverse: np.ndarray  # [G, m, m], of basis^T basis
    limit: float  # of the sum of squares, within LEVEL
    spread: Spread
    around: np.ndarray  # [G] bool: within the limit, or a cell beside one that is
    sigma: float  # of a point around the curve
    row_ends: Interval
    column_ends: Interval

    def score(self, compute: np.ndarray) -> np.ndarray:
        """Return the best curve [n] at compute [n]."""
        return self._scored(self._best(compute))

    def band(self, compute: np.ndarray) -> np.ndarray:
        """Return [2, n], between what the curve lies at compute [n]; a point around it does not."""
        least, most = np.full(len(compute), np.inf), np.full(len(compute), -np.inf)
        for inside in np.array_split(np.flatnonzero(self.squares <= self.limit), _CELLS):  # memory
            basis = self._basis(compute, inside)
            value = (basis @ self.coefficients[inside][..., None])[..., 0]
            room = (self.limit - self.squares[inside])[:, None]
            reach = np.sqrt(room * ((basis @ self.inverse[inside]) * basis).sum(-1))
            least = np.minimum(least, (value - reach).min(0, initial=np.inf))
            most = np.maximum(most, (value + reach).max(0, initial=-np.inf))
        return np.sort(self._scored(self.spread.wider(self._best(compute), np.stack([least, most]))), axis=0)

    def coefficient(self, index: int) -> tuple[float, Interval]:
        """Return a coefficient of the best curve, and its interval."""
        inside = self.squares <= self.limit
        value = self.coefficients[inside, index]
        reach = np.sqrt((self.limit - self.squares[inside]) * self.inverse[inside, index, index])
        best = self.coefficients[-1, index]
        low, high = self.spread.wider(best, np.array([(value - reach).min(), (value + reach).max()]))
        return float(best), (float(low), float(high))

    def shape(self, axis: str) -> tuple[float, Interval]:
        """Return the best "row" or "column", and its interval, rounded up to cells; an end of the grid is infinite."""
        values, (low, high) = (self.row, self.row_ends) if axis == "row" else (self.column, self.column_ends)
        slack = 1e-6 * (high - low)
        ends = float(values[self.around].min()), float(values[self.around].max())
        least, most = -math.inf if ends[0] <= low + slack else ends[0], math.inf if ends[1] >= high - slack else ends[1]
        return float(values[-1]), (least, most)

    def _best(self, compute: np.ndarray) -> np.ndarray:
        best = np.array([-1])
        return (self._basis(compute, best) @ self.coefficients[best][..., None])[0, :, 0]

    def _basis(self, compute: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        return self.law.basis(_log(compute) - self.centre, self.row[chosen], self.column[chosen])

    def _scored(self, target: np.ndarray) -> np.ndarray:
        return 1 - target if self.law.is_loss else target


def _sigmoid(log_compute: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    power = np.exp(row)[:, None] * (log_compute - column[:, None])
    share = 1 / (1 + np.exp(np.minimum(-power, 700.0)))
    return np.stack([1 - share, share], axis=-1)


def _power(log_compute: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    return np.exp(np.minimum(-column[:, None] * log_compute, 700.0))[..., None]


def _ones(log_compute: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    return np.ones((len(row), len(log_compute), 1))


SIGMOID = Law(
    name="sigmoid",
    numbers=4,
    rows=_EXPONENTS,
    columns=lambda least, most: (least - _FAR[0], most + _FAR[1]),
    basis=_sigmoid,
)
LOG_LINEAR = Law(
    name="log-linear", numbers=2, rows=(0.0, 0.0), columns=lambda least, most: (-5.0, 5.0), basis=_power, is_loss=True
)
CONSTANT = Law(name="constant", numbers=1, rows=(0.0, 0.0), columns=lambda least, most: (0.0, 0.0), basis=_ones)
LAWS = (SIGMOID, LOG_LINEAR, CONSTANT)


def fit(law: Law, points: Points) -> Fit:
    """Return a law fitted to points. Raises ValueError where they are too few, or no loss where the law reads one."""
    if law.is_loss:  # at no compute a power of it is infinite
        points = points.where(points.compute > 0)
        if len(points) and points.score.max() > 1:
            raise ValueError(f"{law.name}: reads 1 - score as a loss, but a score is {points.score.max():.6g}")
    log_compute = _log(points.compute)
    finite = log_compute[np.isfinite(log_compute)]
    values, least = len(np.unique(finite)), min(2, law.numbers)
    if len(points) < law.numbers + 2 or values < least:
        raise ValueError(
            f"{law.name}: can't be fitted to {len(points)} points at {values} values of compute above 0; "
            f"give at least {law.numbers + 2} points, at {least} or more such values"
        )
    centre = float(finite.mean())
    log_compute -= centre
    target = 1 - points.score if law.is_loss else points.score
    rows = np.linspace(*law.rows, 1 if law.rows[0] == law.rows[1] else _CELLS)
    column_ends = law.columns(float(finite.min()) - centre, float(finite.max()) - centre)

    def zoomed(zooms: Iterable[bool], limit: float, least: float) -> _Grid:
        grid = _looked(law, log_compute, target, rows, *column_ends)
        for both in zooms:
            grid = _looked(law, log_compute, target, *_closer(grid, limit, least, both=both))
        return grid

    best = zoomed(_TO_LEAST, -math.inf, math.nan).least()
    curve = law.basis(log_compute, np.array([best.row]), np.array([best.column]))[0] @ best.coefficients
    spread = _spread(target - curve, points, law.numbers)
    grid = zoomed(_TO_LIMIT, best.squares + spread.room, best.row)
    inside = grid.squares <= best.squares + spread.room
    return Fit(
        law=law,
        centre=centre,
        row=np.append(np.repeat(grid.row, _CELLS), best.row),
        column=np.append(grid.column, best.column),
        squares=np.append(grid.squares, best.squares),
        coefficients=np.append(grid.coefficients.reshape(inside.size, -1), best.coefficients[None], axis=0),
        inverse=np.append(grid.inverse.reshape(inside.size, *best.inverse.shape), best.inverse[None], axis=0),
        limit=best.squares + spread.room,
        spread=spread,
        around=np.append(_around(inside), True),
        sigma=math.sqrt(best.squares / (len(points) - law.numbers)),
        row_ends=law.rows,
        column_ends=column_ends,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """A shape with its sum of squares, its coefficients [m] and inverse [m, m] as in Fit."""

    row: float
    column: float
    squares: float
    coefficients: np.ndarray
    inverse: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class _Grid:
    """Shapes of rows [R] and columns [R, S], with sums of squares [R, S], coefficients and inverses as in Fit."""

    row: np.ndarray
    column: np.ndarray
    squares: np.ndarray
    coefficients: np.ndarray
    inverse: np.ndarray

    def least(self) -> _Shape:
        best = np.unravel_index(self.squares.argmin(), self.squares.shape)
        return _Shape(
            row=float(self.row[best[0]]),
            column=float(self.column[best]),
            squares=float(self.squares[best]),
            coefficients=self.coefficients[best],
            inverse=self.inverse[best],
        )


def _looked(
    law: Law,
    log_compute: np.ndarray,
    target: np.ndarray,
    row: np.ndarray,
    low: np.ndarray | float,
    high: np.ndarray | float,
) -> _Grid:
    """The grid of rows, and of columns from `low` to `high`, for all rows or each; of many points row by row."""
    column = np.linspace(low, high, _CELLS, axis=-1) + np.zeros((len(row), 1))
    parts = 1 if len(target) < _MANY else len(row)
    solved = [
        _solved(law, log_compute, target, *part)
        for part in zip(np.array_split(row, parts), np.array_split(column, parts), strict=True)
    ]
    squares, coefficients, inverse = (np.concatenate(arrays) for arrays in zip(*solved, strict=True))
    return _Grid(row=row, column=column, squares=squares, coefficients=coefficients, inverse=inverse)


def _solved(
    law: Law, log_compute: np.ndarray, target: np.ndarray, row: np.ndarray, column: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums of squares [R, S], coefficients and inverses of the shapes of rows [R] and columns [R, S]."""
    basis = law.basis(log_compute, np.repeat(row, column.shape[1]), column.ravel())
    turned = basis.swapaxes(1, 2)
    inverse = np.linalg.inv(turned @ basis + _TINY * len(target) * np.eye(basis.shape[-1]))
    coefficients = inverse @ (turned @ target)[..., None]
    residuals = target - (basis @ coefficients)[..., 0]
    squares, grid = (residuals**2).sum(1), column.shape
    return squares.reshape(grid), coefficients.reshape(*grid, -1), inverse.reshape(*grid, *inverse.shape[1:])


def _closer(grid: _Grid, limit: float, least: float, *, both: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, and the ends of the columns [R] of each, that hold what is within the limit, a cell around it.

    Of a row without any it is its least; of rows without any it is that of the grid, and the row `least` is held too
    unless it is nan. Rows are cut only where `both`: when their own least is known, as what is within the limit can be
    far narrower than a cell.
    """
    row, inside = grid.row, grid.squares <= limit
    inside[np.unravel_index(grid.squares.argmin(), inside.shape)] = True
    rows = np.flatnonzero(inside.any(1))
    inside[np.arange(len(row)), grid.squares.argmin(1)] = True
    first = np.maximum(0, inside.argmax(1) - 1)
    last = np.minimum(_CELLS - 1, _CELLS - inside[:, ::-1].argmax(1))
    low, high = grid.column[np.arange(len(row)), first], grid.column[np.arange(len(row)), last]
    if not both or len(row) == 1:
        return row, low, high
    ends = np.fmin(row[max(0, rows[0] - 1)], least), np.fmax(row[min(len(row) - 1, rows[-1] + 1)], least)
    closer = np.linspace(*ends, len(row))
    above = np.minimum(np.maximum(1, np.searchsorted(row, closer)), len(row) - 1)  # the old row that follows
    return closer, np.minimum(low[above - 1], low[above]), np.maximum(high[above - 1], high[above])


def _around(inside: np.ndarray) -> np.ndarray:
    """[R, S] bool: the cells that are inside, and those beside them."""
    around = inside.copy()
    around[1:] |= inside[:-1]
    around[:-1] |= inside[1:]
    around[:, 1:] |= inside[:, :-1]
    around[:, :-1] |= inside[:, 1:]
    return around


def _spread(residuals: np.ndarray, points: Points, numbers: int) -> Spread:
    """Of residuals [n]. Runs with fewer points than numbers can't tell their level: all points count as one run's."""
    names, run = np.unique(points.run, return_inverse=True)
    if len(points) < len(names) * (numbers + 1):
        names, run = names[:1], np.zeros(len(points), int)
    runs = len(names)
    level = np.bincount(run, residuals) / np.bincount(run)
    within = residuals - (level[run] if runs > 1 else 0.0)
    numbers += runs - 1
    dependence = _dependence(within, Points(points.compute, points.score, run), numbers)
    freedom = max(1.0, len(points) / dependence - numbers)
    variance = dependence * float((within**2).sum()) / (len(points) - numbers)
    explained = variance / len(points)
    return Spread(
        room=variance * float(student(freedom)) ** 2,
        freedom=freedom,
        between=max(0.0, float(np.var(level, ddof=1)) / runs - explained) if runs > 1 else 0.0,
        runs=runs,
        dependence=dependence,
    )


def _dependence(residuals: np.ndarray, points: Points, numbers: int) -> float:
    """d: residuals [n] in order of compute within each run; autocorrelations count until the first that is noise."""
    order = np.lexsort((points.compute, points.run))
    residuals, run = residuals[order], points.run[order]
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


def _log(compute: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(compute)
