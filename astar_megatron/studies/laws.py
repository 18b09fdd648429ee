"""Three laws of a score R against compute C, fitted by least squares, with profile-likelihood intervals.

- sigmoid: R = R_0 + (A - R_0) / (1 + (C_mid / C)^B)   arXiv 2510.13786, with R_0 fitted too
- log-linear: ln(1 - R) = E - k ln C                   arXiv 2509.25300: the loss 1 - R is a power of compute
- constant: R = A

Each is linear in some numbers (R_0 and A; e^E; A) once its shape (ln B and ln C_mid; k) is given. So the sum of squares
is computed on a grid of shapes, made finer around its least: no start values, the same result each time.

An interval holds every value that some shape reaches with a sum of squares in the room that the points' spread gives,
and is wider by what runs differ: spread.py. Leaves out what is concluded from a fit, or refused: extrapolation.py.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from astar_megatron.studies.spread import Spread, spread_of

_EXPONENTS = (math.log(0.1), math.log(20.0))  # of the sigmoid, which is a step from there on
_FAR = (math.log(30.0), math.log(1000.0))  # C_mid: so far below the least compute, and above the most
_CELLS = 31  # of the grid along each axis
# How often the grid is made finer, around its least and around all within the limit, and whether along both axes.
_TO_LEAST, _TO_LIMIT = (False, False, True, False) * 4, (False, False, True, False, True, False)
_MANY = 240  # points, from which on the rows of a grid are solved one by one: all at once are slower, and need memory
_TINY = 1e-9  # of the number of points: where a shape does not tell two coefficients apart, any will do
_STEP = 1e-4  # of a numerical derivative, along an axis of the grid

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
        slopes = _slopes(self.law, _log(compute) - self.centre, self.row[-1], self.column[-1], self.coefficients[-1])
        return np.sort(self._scored(self.spread.wider(self._best(compute), np.stack([least, most]), slopes)), axis=0)

    def coefficient(self, index: int) -> tuple[float, Interval]:
        """Return a coefficient of the best curve, and its interval."""
        inside = self.squares <= self.limit
        value = self.coefficients[inside, index]
        reach = np.sqrt((self.limit - self.squares[inside]) * self.inverse[inside, index, index])
        best = self.coefficients[-1, index]
        ends = np.array([(value - reach).min(), (value + reach).max()])
        low, high = self.spread.wider(best, ends, self._only(2 + index))
        return float(best), (float(low), float(high))

    def shape(self, axis: str) -> tuple[float, Interval]:
        """Return the best "row" or "column", and its interval, rounded up to cells; an end of the grid is infinite."""
        is_row = axis == "row"
        values, (low, high) = (self.row, self.row_ends) if is_row else (self.column, self.column_ends)
        slack = 1e-6 * (high - low)

        def within(ends: np.ndarray) -> np.ndarray:
            return np.array(
                [-math.inf if ends[0] <= low + slack else ends[0], math.inf if ends[1] >= high - slack else ends[1]]
            )

        ends = within(np.array([values[self.around].min(), values[self.around].max()]))
        least, most = within(self.spread.wider(values[-1], ends, self._only(0 if is_row else 1)))
        return float(values[-1]), (float(least), float(most))

    def if_runs_agree(self) -> "Fit":
        """Return the fit with the intervals that it has where runs differ by their noise alone."""
        return replace(self, spread=replace(self.spread, of_runs=np.zeros_like(self.spread.of_runs), runs=1))

    def _only(self, place: int) -> np.ndarray:
        return np.eye(2 + self.coefficients.shape[1])[place]

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
    slopes = _slopes(law, log_compute, best.row, best.column, best.coefficients)
    spread = spread_of(target - curve, slopes, points.compute, points.run, law.numbers)
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


def _slopes(law: Law, log_compute: np.ndarray, row: float, column: float, coefficients: np.ndarray) -> np.ndarray:
    """Derivatives [n, 2 + m] of a curve at compute [n] by its row, column and coefficients [m]."""
    rows, columns = row + _STEP * np.array([1, -1, 0, 0, 0]), column + _STEP * np.array([0, 0, 1, -1, 0])
    basis = law.basis(log_compute, rows, columns)
    curves = basis @ coefficients
    shape = (curves[[0, 2]] - curves[[1, 3]]) / (2 * _STEP)
    return np.concatenate([shape.T, basis[-1]], axis=1)


def _log(compute: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(compute)
