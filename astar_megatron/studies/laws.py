"""Three laws of a score R against compute C, fitted by least squares, with profile-likelihood intervals.

- sigmoid: R = R_0 + (A - R_0) / (1 + (C_mid / C)^B)   arXiv 2510.13786, with R_0 fitted too
- log-linear: ln(1 - R) = E - k ln C                   arXiv 2509.25300: the loss 1 - R is a power of compute
- constant: R = A

Each is linear in some numbers (R_0 and A; e^E; A) once its shape (ln B and ln C_mid; k) is given. So the sum of squares
is computed on a grid of shapes, made finer where it is small: no start values, no local minimum, the same result each
time. An interval holds every value that some shape reaches with a sum of squares below min (1 + d t^2 / (n - p)), for p
numbers and n points, with t Student's quantile of n / d - p. d, at least 1, says that points of a run move together: it
is 1 + twice the sum of the autocorrelations of the residuals within runs.

Leaves out what is concluded from a fit, or refused: extrapolation.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

LEVEL = 0.95
_EXPONENTS = (math.log(0.1), math.log(20.0))  # of the sigmoid, which is a step from there on
_FAR = (math.log(30.0), math.log(1000.0))  # C_mid: so far below the least compute, and above the most
_CELLS = 31  # of the grid along each axis
_ZOOMS = (False, False, True, False, True, False)  # how often it is made finer, and whether along both axes
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
class Fit:
    """A law fitted to points: shapes [G] around the best, each with its sum of squares and its coefficients [G, m]."""

    law: Law
    centre: float  # what is subtracted from ln C
    row: np.ndarray
    column: np.ndarray
    squares: np.ndarray
    coefficients: np.ndarray
    inverse: np.ndarray  # [G, m, m], of basis^T basis
    limit: float  # of the sum of squares, within LEVEL
    around: np.ndarray  # [G] bool: within the limit, or a cell beside one that is
    sigma: float  # of a point around the curve
    dependence: float  # d
    row_ends: Interval
    column_ends: Interval

    @property
    def best(self) -> int:
        return int(self.squares.argmin())

    def score(self, compute: np.ndarray) -> np.ndarray:
        """Return the best curve [n] at compute [n]."""
        best = np.array([self.best])
        return self._scored((self._basis(compute, best) @ self.coefficients[best][..., None])[0, :, 0])

    def band(self, compute: np.ndarray) -> np.ndarray:
        """Return [2, n], between what the curve lies at compute [n]; a point around it does not."""
        least, most = np.full(len(compute), np.inf), np.full(len(compute), -np.inf)
        for inside in np.array_split(np.flatnonzero(self.squares <= self.limit), _CELLS):  # memory
            basis = self._basis(compute, inside)
            value = np.einsum("gnm,gm->gn", basis, self.coefficients[inside])
            room = (self.limit - self.squares[inside])[:, None]
            reach = np.sqrt(room * np.einsum("gnm,gmk,gnk->gn", basis, self.inverse[inside], basis))
            least = np.minimum(least, (value - reach).min(0, initial=np.inf))
            most = np.maximum(most, (value + reach).max(0, initial=-np.inf))
        return np.sort(self._scored(np.stack([least, most])), axis=0)

    def coefficient(self, index: int) -> tuple[float, Interval]:
        """Return a coefficient of the best curve, and its interval."""
        inside = self.squares <= self.limit
        value = self.coefficients[inside, index]
        reach = np.sqrt((self.limit - self.squares[inside]) * self.inverse[inside, index, index])
        ends = float((value - reach).min()), float((value + reach).max())
        return float(self.coefficients[self.best, index]), ends

    def shape(self, axis: str) -> tuple[float, Interval]:
        """Return the best "row" or "column", and its interval, rounded up to cells; an end of the grid is infinite."""
        values, (low, high) = (self.row, self.row_ends) if axis == "row" else (self.column, self.column_ends)
        slack = 1e-6 * (high - low)
        ends = float(values[self.around].min()), float(values[self.around].max())
        least, most = -math.inf if ends[0] <= low + slack else ends[0], math.inf if ends[1] >= high - slack else ends[1]
        return float(values[self.best]), (least, most)

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
    if len(points) < law.numbers + 2 or len(np.unique(finite)) < min(2, law.numbers):
        raise ValueError(
            f"{law.name}: {law.numbers} numbers can't be fitted to {len(points)} points at {len(np.unique(finite))} "
            "values of compute above 0; give more points"
        )
    centre = float(finite.mean())
    column_ends = law.columns(float(finite.min()) - centre, float(finite.max()) - centre)
    row, low, high = np.linspace(*law.rows, 1 if law.rows[0] == law.rows[1] else _CELLS), *column_ends
    for both in _ZOOMS:
        row, low, high = _closer(_looked(law, log_compute - centre, points, row, low, high), both=both)
    grid = _looked(law, log_compute - centre, points, row, low, high)
    size = grid.squares.size
    return Fit(
        law=law,
        centre=centre,
        row=np.repeat(grid.row, _CELLS),
        column=grid.column.ravel(),
        squares=grid.squares.ravel(),
        coefficients=grid.coefficients.reshape(size, -1),
        inverse=grid.inverse.reshape(size, *grid.inverse.shape[2:]),
        limit=grid.limit,
        around=_around(grid.squares <= grid.limit).ravel(),
        sigma=math.sqrt(float(grid.squares.min()) / (len(points) - law.numbers)),
        dependence=grid.dependence,
        row_ends=law.rows,
        column_ends=column_ends,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Grid:
    """Shapes of rows [R] and columns [R, S], with sums of squares [R, S], coefficients and inverses as in Fit."""

    row: np.ndarray
    column: np.ndarray
    squares: np.ndarray
    coefficients: np.ndarray
    inverse: np.ndarray
    limit: float
    dependence: float


def _looked(
    law: Law,
    log_compute: np.ndarray,
    points: Points,
    row: np.ndarray,
    low: np.ndarray | float,
    high: np.ndarray | float,
) -> _Grid:
    """The grid of rows, and of columns from `low` to `high`, for all rows or each; row by row, to save memory."""
    column = np.linspace(low, high, _CELLS, axis=-1) + np.zeros((len(row), 1))
    score, solved = points.score, []
    target = 1 - score if law.is_loss else score
    for at, columns in zip(row, column, strict=True):
        basis = law.basis(log_compute, np.full(len(columns), at), columns)
        products = np.einsum("snm,snk->smk", basis, basis)
        inverse = np.linalg.inv(products + _TINY * len(score) * np.eye(basis.shape[-1]))
        coefficients = np.einsum("smk,snk,n->sm", inverse, basis, target)
        residuals = target - np.einsum("snm,sm->sn", basis, coefficients)
        solved.append(((residuals**2).sum(1), coefficients, inverse))
    squares, coefficients, inverse = (np.stack(parts) for parts in zip(*solved, strict=True))
    best = np.unravel_index(squares.argmin(), squares.shape)
    curve = law.basis(log_compute, row[best[0]][None], column[best][None])[0] @ coefficients[best]
    dependence = _dependence(target - curve, points)
    return _Grid(
        row=row,
        column=column,
        squares=squares,
        coefficients=coefficients,
        inverse=inverse,
        limit=float(squares.min()) * (1 + _room(len(score), law.numbers, dependence)),
        dependence=dependence,
    )


def _closer(grid: _Grid, *, both: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, and the ends of the columns [R] of each, that hold what is within the limit, a cell around it.

    Of a row without any it is the least. Rows are cut only where `both`: when their own least is known, as what is
    within the limit can be far narrower than a cell.
    """
    row, inside = grid.row, grid.squares <= grid.limit
    rows = np.flatnonzero(inside.any(1))
    inside[np.arange(len(row)), grid.squares.argmin(1)] = True
    first = np.maximum(0, inside.argmax(1) - 1)
    last = np.minimum(_CELLS - 1, _CELLS - inside[:, ::-1].argmax(1))
    low, high = grid.column[np.arange(len(row)), first], grid.column[np.arange(len(row)), last]
    if not both or len(row) == 1:
        return row, low, high
    closer = np.linspace(row[max(0, rows[0] - 1)], row[min(len(row) - 1, rows[-1] + 1)], len(row))
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


def _dependence(residuals: np.ndarray, points: Points) -> float:
    """d: residuals [n] in order of compute within each run; autocorrelations count until the first that is noise."""
    order = np.lexsort((points.compute, points.run))
    residuals, run = residuals[order], points.run[order]
    total, dependence = float((residuals**2).sum()), 1.0
    for lag in range(1, len(residuals)):
        together = run[lag:] == run[:-lag]
        pairs = int(together.sum())
        if pairs < 2 or total == 0:
            break
        correlation = float((residuals[lag:] * residuals[:-lag])[together].sum()) / pairs / (total / len(residuals))
        if correlation < 2 / math.sqrt(pairs):
            break
        dependence += 2 * correlation * pairs / len(residuals)
    return dependence


def _room(points: int, numbers: int, dependence: float) -> float:
    """By what share of its minimum the sum of squares may be larger."""
    return dependence * student(max(1.0, points / dependence - numbers)) ** 2 / (points - numbers)


def student(freedom: float) -> float:
    """Return t so that Student's t with so many degrees of freedom lies within -t and t in LEVEL of cases.

    The series is that of Abramowitz and Stegun, 26.7.5.
    """
    if freedom < 3:  # where the series is poor: exact at 1 and 2
        chance = 1 - LEVEL
        exact = 1 / math.tan(chance * math.pi / 2), math.sqrt(2 / (chance * (2 - chance)) - 2)
        return exact[0] if freedom < 2 else exact[1]
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))


def _log(compute: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(compute)
