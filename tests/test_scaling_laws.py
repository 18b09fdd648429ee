"""The laws of `astar scale fit`: what they find where the truth is known, what they refuse, which tables they read."""

import csv
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot
from samples import evaluation

from astar_megatron.run import scores
from astar_megatron.run.tracking import Tracker, read_metrics
from astar_megatron.scaling_fit import fit as scale_fit
from astar_megatron.studies import laws
from astar_megatron.studies.comparison import Run
from astar_megatron.studies.extrapolation import Extrapolation, extrapolate
from astar_megatron.studies.laws import CONSTANT, LOG_LINEAR, SIGMOID, Points, fit
from astar_megatron.studies.score_curves import read_curves
from astar_megatron.studies.spread import student
from astar_megatron.studies.study import course_of

START, ASYMPTOTE, MIDDLE, EXPONENT = 0.2, 0.8, 0.25, 2.0


def sigmoid(compute: np.ndarray, middle: float = MIDDLE, exponent: float = EXPONENT) -> np.ndarray:
    return START + (ASYMPTOTE - START) / (1 + (middle / compute) ** exponent)


def study(
    seed: int,
    truth: Callable[[np.ndarray], np.ndarray] = sigmoid,
    *,
    steps: int = 24,
    runs: int = 3,
    responses: int = 512,
    together: float = 0.0,
    apart: float = 0.0,
    end: float = 1.0,
) -> Points:
    """Mean rewards of `responses` a step that are 0 or 1, as steps have them.

    `together` is the correlation of a step's noise with that of the step before it, `apart` the standard deviation by
    which runs differ.
    """
    random = np.random.default_rng(seed)
    compute = np.linspace(end / steps, end, steps)
    score = truth(compute)
    noise = random.standard_normal((runs, steps))
    for step in range(1, steps):
        noise[:, step] = together * noise[:, step - 1] + math.sqrt(1 - together**2) * noise[:, step]
    noise = noise * np.sqrt(np.abs(score * (1 - score)) / responses) + apart * random.standard_normal((runs, 1))
    return Points(np.tile(compute, runs), (score + noise).ravel(), np.repeat(np.arange(runs), steps))


def unlike_study(seed: int, *, unlike: float = 0.0, apart: float = 0.0, lengths: tuple[float, ...]) -> Points:
    """A study whose runs go on for different shares of the compute, 40 steps for all of it.

    `unlike` is the standard deviation by which the logarithms of their exponents and middles differ.
    """
    random = np.random.default_rng(seed)
    runs = []
    for length in lengths:
        compute = np.arange(1, round(40 * length) + 1) / 40
        middle, exponent = np.exp(unlike * random.standard_normal(2)) * (MIDDLE, EXPONENT)
        score = sigmoid(compute, middle, exponent) + apart * random.standard_normal()
        runs.append((compute, score + 0.01 * random.standard_normal(len(compute))))
    compute, score = (np.concatenate(columns) for columns in zip(*runs, strict=True))
    return Points(compute, score, np.repeat(np.arange(len(runs)), [len(run) for run, _ in runs]))


def coverage(studies: int, drawn: Callable[..., Points] = study, **options: Any) -> dict[str, float]:
    """In what share of the studies the 95 % intervals hold the true numbers and the curve at twice the end."""
    hits = {"asymptote": 0, "exponent": 0, "middle": 0, "beyond": 0}
    for seed in range(studies):
        whole = fit(SIGMOID, drawn(seed, **options))
        low, high = whole.coefficient(1)[1]
        hits["asymptote"] += low <= ASYMPTOTE <= high
        low, high = whole.shape("row")[1]
        hits["exponent"] += low <= math.log(EXPONENT) <= high
        low, high = whole.shape("column")[1]
        hits["middle"] += low <= math.log(MIDDLE) - whole.centre <= high
        beyond = np.array([2.0])
        low, high = whole.band(beyond)[:, 0]
        hits["beyond"] += low <= sigmoid(beyond)[0] <= high
    return {name: count / studies for name, count in hits.items()}


# --- intervals


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    assert min(coverage(20, steps=12).values()) >= 0.8


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"steps": 10, "responses": 1024},
        {"runs": 1, "steps": 60},
        {"together": 0.5, "steps": 40},
        {"apart": 0.01, "runs": 4, "steps": 40},
        {"together": 0.8, "runs": 1, "steps": 60},
    ],
    ids=[
        *("plain", "few points", "a single run", "steps that move together", "runs that differ"),
        "steps of a single run that move together",
    ],
)
def test_95_per_cent_intervals_hold_the_truth_in_90_to_99_of_100_of_200_studies(options: dict[str, Any]) -> None:
    shares = coverage(200, **options)
    assert all(0.9 <= share <= 0.99 for share in shares.values()), shares


UNLIKE = [
    {"unlike": 0.2, "lengths": (1.0,) * 4},
    {"apart": 0.02, "lengths": (1.0, 0.7, 0.5, 0.3)},
    {"apart": 0.02, "lengths": (1.0, 0.5, 0.4)},
    {"unlike": 0.1, "apart": 0.01, "lengths": (1.0, 1.0, 0.7, 0.7, 0.4, 0.4)},
    {"lengths": (1.0, 0.7, 0.5, 0.3)},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", UNLIKE, ids=["shapes", "lengths", "three lengths", "all", "lengths alone"])
def test_intervals_hold_the_truth_where_runs_differ_in_shape_and_length(options: dict[str, Any]) -> None:
    shares = coverage(200, unlike_study, **options)
    assert min(shares.values()) >= 0.88 and shares["middle"] <= 0.99, shares


TWO = [{"apart": 0.03, "lengths": (1.0, 1.0)}, {"unlike": 0.1, "apart": 0.01, "lengths": (1.0, 1.0)}]


@pytest.mark.slow
@pytest.mark.parametrize("options", TWO, ids=["levels", "all"])
def test_intervals_of_two_runs_that_differ_hold_the_truth(options: dict[str, Any]) -> None:
    assert min(coverage(200, unlike_study, **options).values()) >= 0.85


def test_two_runs_that_lie_together_may_do_so_by_chance() -> None:
    """How far runs differ is guessed for two of them, and measured for many."""

    def widened(runs: int) -> float:
        fits = [fit(SIGMOID, study(seed, runs=runs, steps=40)) for seed in range(5)]
        widths = [[float(np.ptp(law.coefficient(1)[1])) for law in (whole.if_runs_agree(), whole)] for whole in fits]
        return min(all_differ / agree for agree, all_differ in widths)

    assert widened(1) == 1 and widened(2) > 1.7 and widened(6) < 1.1


def test_what_runs_of_unequal_length_differ_by_is_in_the_intervals_of_each_number() -> None:
    hits = np.zeros(2)
    for seed in range(15):
        whole = fit(SIGMOID, unlike_study(seed, apart=0.02, lengths=(1.0, 0.5, 0.4)))
        for row, law in enumerate((whole.if_runs_agree(), whole)):
            (least, most), (low, high) = law.coefficient(1)[1], law.shape("column")[1]
            hits[row] += (least <= ASYMPTOTE <= most) and (low <= math.log(MIDDLE) - whole.centre <= high)
    assert hits[0] <= 6 and hits[1] >= 9


def test_without_noise_the_numbers_are_the_true_ones() -> None:
    whole = fit(SIGMOID, study(0, responses=10**12))
    asymptote, start = whole.coefficient(1)[0], whole.coefficient(0)[0]
    exponent, middle = math.exp(whole.shape("row")[0]), math.exp(whole.shape("column")[0] + whole.centre)
    assert [asymptote, start, exponent, middle] == pytest.approx([ASYMPTOTE, START, EXPONENT, MIDDLE], rel=1e-3)


@pytest.mark.parametrize("exponent", [0.05, 0.4, 0.5, 0.73, 2.9])
@pytest.mark.parametrize("steps", [7, 40, 61])
def test_the_exponent_of_a_power_law_is_the_true_one_wherever_it_lies(exponent: float, steps: int) -> None:
    points = study(0, lambda compute: 1 - 0.3 * compute**-exponent, responses=10**12, end=50.0, steps=steps)
    loss = fit(LOG_LINEAR, points)
    assert loss.shape("column")[0] == pytest.approx(exponent, rel=1e-3)


@pytest.mark.parametrize("seed", range(6))
def test_a_fit_is_the_least_squares_where_runs_lie_apart_and_steps_move_together(seed: int) -> None:
    points = study(seed, steps=40, apart=0.02, together=0.8, responses=4096)
    whole = fit(SIGMOID, points)
    least = float(((points.score - whole.score(points.compute)) ** 2).sum())
    random = np.random.default_rng(seed)
    for row, column in random.normal((whole.row[-1], whole.column[-1]), 0.01, size=(200, 2)):
        basis = SIGMOID.basis(np.log(points.compute) - whole.centre, np.array([row]), np.array([column]))[0]
        residuals = points.score - basis @ np.linalg.lstsq(basis, points.score, rcond=None)[0]
        assert least <= float((residuals**2).sum()) * (1 + 1e-6)


def test_a_grid_solved_at_once_and_row_by_row_is_the_same_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    points, fits = study(1), []
    for many in (1, len(points) + 1):
        monkeypatch.setattr(laws, "_MANY", many)
        fits.append(fit(SIGMOID, points))
    row_by_row, at_once = fits
    assert at_once.squares == pytest.approx(row_by_row.squares, rel=1e-6)
    assert at_once.shape("row")[1] == pytest.approx(row_by_row.shape("row")[1], rel=1e-5)
    assert at_once.coefficient(1)[1] == pytest.approx(row_by_row.coefficient(1)[1], rel=1e-5)


def test_the_fit_does_not_depend_on_the_unit_of_compute() -> None:
    points = study(3)
    flops = Points(points.compute * 1e21, points.score, points.run)
    here, there = fit(SIGMOID, points), fit(SIGMOID, flops)
    assert there.coefficient(1)[1] == pytest.approx(here.coefficient(1)[1], rel=1e-6)
    assert there.shape("row")[1] == pytest.approx(here.shape("row")[1], rel=1e-6)


def test_intervals_are_wider_where_steps_of_a_run_move_together() -> None:
    def width(together: float) -> float:
        widths = []
        for seed in range(5):
            low, high = fit(SIGMOID, study(seed, together=together, steps=40)).coefficient(1)[1]
            widths.append(high - low)
        return float(np.median(widths))

    assert width(0.8) > 1.5 * width(0.0)


def test_a_point_without_compute_counts_for_the_sigmoids_start() -> None:
    points = study(4)
    untrained = Points(
        np.append(points.compute, [0.0] * 20), np.append(points.score, [0.1] * 20), np.append(points.run, [9] * 20)
    )
    assert fit(SIGMOID, untrained).coefficient(0)[0] < fit(SIGMOID, points).coefficient(0)[0]
    assert fit(LOG_LINEAR, untrained).score(np.array([0.5])) == fit(LOG_LINEAR, points).score(np.array([0.5]))


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (10, 2.2281), (120, 1.9799)])
def test_students_quantile_is_that_of_the_tables(freedom: float, quantile: float) -> None:
    assert student(freedom) == pytest.approx(quantile, rel=2e-3)


# --- what is concluded


def refusals(result: Extrapolation) -> dict[str, str]:
    return {name: number.refusal for name, number in result.laws[0].numbers.items() if number.refusal}


def test_a_curve_that_levels_off_in_its_first_half_extrapolates() -> None:
    result = extrapolate("x", study(0, responses=4096), 0.02)
    assert (result.verdict, result.best and result.best.law) == ("extrapolates", "sigmoid")
    assert refusals(result) == {}
    assert len(result.late.score) == 10 and result.late.count.sum() == 3 * 12


def test_a_power_law_is_told_from_a_sigmoid_by_what_it_predicts() -> None:
    result = extrapolate("x", study(0, lambda c: 1 - 0.5 * c**-0.3, responses=10**6, end=20.0), 0.02)
    assert (result.verdict, result.best and result.best.law) == ("extrapolates", "log-linear")


def test_a_curve_that_goes_on_otherwise_does_not_extrapolate() -> None:
    result = extrapolate("x", study(0, lambda c: np.where(c < 0.6, sigmoid(c), 0.3), responses=4096), 0.02)
    assert result.verdict == "does not" and "its error is" in result.reason


def test_noise_above_the_tolerance_is_named_as_the_reason() -> None:
    result = extrapolate("x", study(1, responses=16, runs=1), 0.02)
    assert result.verdict == "does not" and "more seeds or more prompts" in result.reason
    assert result.best is not None and f"its error is {result.best.error:.3g}" in result.reason


def test_an_error_of_many_times_the_noise_is_not_put_down_to_it() -> None:
    tolerance = 0.002
    result = extrapolate("x", study(0, lambda c: np.where(c < 0.51, sigmoid(c), 0.3), responses=512), tolerance)
    assert result.verdict == "does not" and "more seeds" not in result.reason
    error, noise = map(float, re.findall(r"its error is (\S+); .* by ± (\S+)", result.reason)[0])
    assert error > 5 * noise > 5 * tolerance


def test_an_asymptote_is_refused_where_the_sigmoid_misses_by_many_times_a_noise_above_the_tolerance() -> None:
    compute, random = np.linspace(1 / 40, 1.0, 40), np.random.default_rng(0)
    score = sigmoid(compute) + 0.01 * random.standard_normal((3, 40))
    score[:, 20:] += 0.05
    points = Points(np.tile(compute, 3), score.ravel(), np.repeat(np.arange(3), 40))
    assert all("misses the later means" in refusals(extrapolate("x", points, t))["asymptote"] for t in (0.002, 0.02))


def test_a_rise_that_hides_in_the_tolerance_is_not_called_foretold() -> None:
    compute, run = np.arange(1, 41.0), np.zeros(40, int)
    rise = 0.004 + 0.017 * np.maximum(0, compute - 20) / 20
    noise = np.random.default_rng(0).standard_normal((2, 40))
    points = Points(compute, rise + 0.0005 * noise[0], run)
    result = extrapolate("x", points, 0.02)
    assert result.verdict == "can't be told" and "lower --tolerance" in result.reason
    assert extrapolate("x", points, 0.002).verdict == "does not"
    apart = np.concatenate([rise, rise + 0.05]) + 0.0005 * noise.ravel()
    assert extrapolate("x", Points(np.tile(compute, 2), apart, np.repeat([0, 1], 40)), 0.02).verdict == "can't be told"
    for score in (rise + 0.01 * noise[0], 0.004 + 0.0005 * noise[0]):  # the noise explains the error, or it is small
        assert extrapolate("x", Points(compute, score, run), 0.02).verdict == "extrapolates"
    early_rise = np.where(compute < 5, 0.0, 0.012)  # of which the error is more than a fifth
    assert extrapolate("x", Points(compute, early_rise + rise, run), 0.02).verdict == "can't be told"


@pytest.mark.parametrize("score", [0.5, 1.0, 1 / 3, 100.0])
def test_a_curve_that_never_changes_is_foretold(score: float) -> None:
    compute, run = np.arange(1, 41.0), np.zeros(40, int)
    a_problem_more = np.where(compute > 20, score * 1.003, score)
    never = extrapolate("x", Points(np.tile(compute, 3), np.full(120, score), np.repeat([0, 1, 2], 40)), 0.02)
    assert all("a constant fits as well" in words for words in refusals(never).values()) and len(refusals(never)) == 4
    for level in (np.full(40, score), a_problem_more):
        assert extrapolate("x", Points(compute, level, run), 0.02 * score).verdict == "extrapolates"


def test_scores_in_per_cent_are_told_with_the_unit_of_the_tolerance() -> None:
    words = "scores look like per cent, --tolerance is in their unit"
    points = study(0, sigmoid, responses=4096)
    in_per_cent = Points(points.compute, 100 * points.score, points.run)
    assert words in extrapolate("x", in_per_cent, 0.02).reason
    assert words not in extrapolate("x", points, 0.02).reason


def test_an_asymptote_beyond_the_data_is_refused() -> None:
    result = extrapolate("x", study(0, end=0.2), 0.02)
    assert "have not levelled off" in refusals(result)["asymptote"]
    assert result.laws[0].numbers["asymptote"].interval is None


def test_scores_that_do_not_change_have_neither_asymptote_nor_exponent() -> None:
    result = extrapolate("x", study(0, lambda c: np.full(len(c), 0.5), responses=4096), 0.02)
    assert {"asymptote", "exponent"} <= set(refusals(result))
    assert result.verdict == "extrapolates"
    level = extrapolate("x", study(0, lambda c: np.full(len(c), 0.5), responses=10**20), 0.02)
    assert level.best is not None and level.best.law == "constant"


@pytest.mark.parametrize("rows", [20, 40, 60, 100, 110])
def test_the_parts_of_evenly_spaced_scores_are_equal(rows: int) -> None:
    compute = np.arange(1, rows + 1) * 1000.0
    late = extrapolate("x", Points(compute, sigmoid(compute / compute[-1]), np.zeros(rows, int)), 0.02).late
    assert len(late.count) == 10 and np.ptp(late.count) <= (rows % 20 != 0)


def test_runs_that_lie_apart_leave_the_shape_as_known_as_a_run_and_the_asymptote_by_their_mean() -> None:
    widths = []
    for seed in range(10):
        points = study(seed, steps=40, apart=0.01, responses=10**5)
        numbers = extrapolate("x", points, 0.02).laws[0].numbers
        alone = fit(SIGMOID, points.where(points.run == 0))
        together = fit(SIGMOID, points)
        assert numbers["asymptote"].interval is not None and numbers["exponent"].interval is not None
        widths.append(np.ptp(together.shape("row")[1]) / np.ptp(alone.shape("row")[1]))
        level = np.std([points.score[points.run == run].mean() for run in range(3)], ddof=1) / math.sqrt(3)
        low, high = together.coefficient(1)[1]
        assert (high - low) / 2 >= 1.9 * level
    assert np.median(widths) < 1


def test_a_start_that_the_points_leave_open_is_refused() -> None:
    told = []
    for seed in range(12):
        points = study(seed, steps=30, runs=1)
        numbers = extrapolate("x", points.where(points.compute > 0.17), 0.02).laws[0].numbers
        told += [np.ptp(numbers["start"].interval)] if numbers["start"].interval else []
    assert len(told) < 12 and all(width <= 1 for width in told)


def test_a_sudden_rise_has_no_exponent() -> None:
    result = extrapolate("x", study(0, lambda c: np.where(c < 0.3, 0.1, 0.8), responses=10**6), 0.05)
    assert "sudden" in refusals(result)["exponent"] and "asymptote" not in refusals(result)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_too_few_points_are_refused_in_words(steps: int) -> None:
    points = study(0, steps=steps, runs=1)
    result = extrapolate("x", points, 0.02)
    assert result.verdict == "can't be told"
    assert "can't be fitted to" in (result.laws[0].refusal or "")
    with pytest.raises(ValueError, match=r"give at least \d points"):
        fit(SIGMOID, points)


def test_rewards_above_1_are_no_loss_and_only_that_law_is_refused() -> None:
    result = extrapolate("x", study(0, lambda c: 3 * sigmoid(c)), 0.02)
    assert [law.refusal is None for law in result.laws] == [True, False, True]
    assert "reads 1 - score as a loss" in (result.laws[1].refusal or "")


def test_the_constant_is_the_mean() -> None:
    points = study(2)
    assert fit(CONSTANT, points).score(np.array([1.0, 9.0])) == pytest.approx([points.score.mean()] * 2)


# --- tables


def write_csv(path: Path, columns: dict[str, list[Any]]) -> str:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return str(path)


@pytest.mark.parametrize(
    ("columns", "compute"),
    [
        (
            {"training/global_step": [1, 2], "perf/total_num_tokens": [10, 20], "critic/score/mean": [0.1, 0.2]},
            [10, 30],
        ),
        ({"_step": [0, 1], "train/reward": [0.1, 0.2], "train/total_num_tokens": [5, 6]}, [5, 11]),
        ({"train/num_tokens": [7, 9], "train/reward": [0.1, 0.2]}, [7, 9]),
        ({"step": [1, 2], "num_tokens": [7, 9], "reward": [0.1, 0.2], "reward_std": [1, 1]}, [7, 9]),
    ],
    ids=["verl", "NeMo-RL", "TRL in W&B", "TRL"],
)
def test_tables_of_other_trainers_are_recognised(
    columns: dict[str, list[Any]], compute: list[float], tmp_path: Path
) -> None:
    (curve,) = read_curves([write_csv(tmp_path / "run.csv", columns)])
    assert (curve.name, curve.points.compute.tolist(), curve.points.score.tolist()) == ("run", compute, [0.1, 0.2])


def test_the_file_of_verls_own_logger_is_recognised(tmp_path: Path) -> None:
    rows = [{"perf/total_num_tokens": tokens, "critic/score/mean": score} for tokens, score in ((10, 0.1), (20, 0.2))]
    lines = [json.dumps({"step": step, "data": data}) + "\n" for step, data in enumerate(rows, 1)]
    file = tmp_path / "run.jsonl"
    file.write_text("".join(lines))
    (curve,) = read_curves([str(file)])
    assert (curve.points.compute.tolist(), curve.points.score.tolist()) == ([10, 30], [0.1, 0.2])
    file.write_text(lines[0] + lines[0])
    with pytest.raises(ValueError, match=r"row 2: .* in order of their steps, each once"):
        read_curves([str(file)])


def test_columns_can_be_named_and_rows_without_a_score_still_cost(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "x.csv", {"cost": [1, 2, 4, 8], "val": [0.1, "", "NaN", 0.3]})
    (curve,) = read_curves([path], "cost", "val", per_row=True)
    assert (curve.points.compute.tolist(), curve.points.score.tolist()) == ([1, 15], [0.1, 0.3])
    (curve,) = read_curves([path], "cost", "val")
    assert curve.points.compute.tolist() == [1, 8]


def test_a_folder_that_can_not_be_made_is_refused_before_the_fit(tmp_path: Path, monkeypatch: Any) -> None:
    path = write_csv(tmp_path / "x.csv", {"spent_flops": [1, 2, 4, 8], "reward_mean": [0.1, 0.2, 0.3, 0.3]})
    monkeypatch.setattr("astar_megatron.scaling_fit.extrapolate", lambda *_: pytest.fail("fitted"))
    with pytest.raises(ValueError, match="can't create the folder"):
        scale_fit([path], tmp_path / "x.csv" / "out", None, None, per_row=False, tolerance=0.05)


def fitted(path: str, out: Path) -> tuple[dict[str, Any], str]:
    """What `astar scale fit` writes of one curve, and what it says."""
    scale_fit([path], out, None, None, per_row=False, tolerance=0.05)
    (curve,) = json.loads((out / "fit.json").read_text())["curves"]
    return curve, (out / "fit.md").read_text()


@pytest.mark.parametrize("lost", [math.nan, None], ids=["nan", "null"])
def test_a_curve_that_ends_in_lost_scores_does_not_extrapolate(lost: float | None, tmp_path: Path) -> None:
    points = study(0, responses=4096, runs=1)
    rows = [{"num_tokens": compute} for compute in points.compute.tolist()]
    for ending, verdict in ((slice(0, 0), "extrapolates"), (slice(8, 10), "extrapolates"), (slice(18, 24), "can't be")):
        for row, score in zip(rows, points.score.tolist(), strict=True):
            row["reward"] = score
        for row in rows[ending]:
            row["reward"] = lost
        (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
        curve, text = fitted(str(tmp_path / "x.jsonl"), tmp_path / "out")
        count, first = len(rows[ending]), rows[ending][0]["num_tokens"] if rows[ending] else None
        assert curve["verdict"].startswith(verdict) and (curve["lost_rows"], curve["lost_from"]) == (count, first)
        words = f"{count} of 24 rows have no score but nan or null, from num_tokens"
        assert (words in text) == (count > 0)
    assert "but it ends in 6 rows without a score" in text


def test_rows_that_were_not_evaluated_are_not_lost_and_a_run_that_lost_all_has_no_points(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "x.csv", {"num_tokens": [1, 2, 3, 4], "reward": [0.1, "", 0.2, ""]})
    (curve,) = read_curves([path])
    assert (list(curve.lost), curve.points.compute.tolist()) == ([], [1, 3])
    path = write_csv(tmp_path / "x.csv", {"num_tokens": [1, 2], "reward": ["nan", "NaN"]})
    curve, text = fitted(path, tmp_path / "out")
    assert (curve["verdict"], curve["points"], curve["lost_at_end"]) == ("can't be told", 0, 2)
    assert "can't be told. no row has a score." in text and "not fitted" not in text


def test_a_runs_folder_that_lost_its_rewards_says_so(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "run")
    for step in range(4):
        tracker.log(metrics(step) | ({"reward_mean": math.nan} if step > 1 else {}))
    (curve,) = read_curves([str(tmp_path / "run")])
    assert (curve.lost, curve.lost_at_end) == ([10, 15], 2)


@pytest.mark.parametrize("names", [("perf/total_num_tokens", "critic/score/mean"), ("cost", "val")])
@pytest.mark.parametrize("steps", ["training/global_step", "step", "Step", "_step"])
def test_compute_of_single_rows_is_added_up_only_in_the_order_of_steps_each_once(
    steps: str, names: tuple[str, str], tmp_path: Path
) -> None:
    for order in ([1, 0], [0, 1, 1, 2], [0, 1, 2, 1, 2, 3]):
        columns = {steps: order, names[0]: [5] * len(order), names[1]: [0.1] * len(order)}
        path = write_csv(tmp_path / "x.csv", columns)
        with pytest.raises(ValueError, match=r"x\.csv, row \d: .* in order of their steps, each once"):
            read_curves([path], *names, per_row=names[0] == "cost")


def test_a_score_whose_row_lacks_its_own_compute_is_refused_but_for_the_untrained_models(tmp_path: Path) -> None:
    columns: dict[str, list[Any]] = {"step": [0, 1, 2], "cost": ["", 5, 5], "val": [0.1, 0.2, 0.3]}
    (curve,) = read_curves([write_csv(tmp_path / "x.csv", columns)], "cost", "val", per_row=True)
    assert curve.points.compute.tolist() == [0, 5, 10]
    for lacking in ({"step": [1, 2, 3]}, {"cost": ["", "", 5]}, {"cost": [5, "", 5]}, {"cost": [5, 5, "NaN"]}):
        path = write_csv(tmp_path / "x.csv", columns | lacking)
        with pytest.raises(ValueError, match=r"x\.csv, row \d: has val, but no cost, which is added up"):
            read_curves([path], "cost", "val", per_row=True)


def test_steps_that_a_table_of_verl_leaves_out_have_spent_too(tmp_path: Path) -> None:
    columns: dict[str, list[Any]] = {"perf/total_num_tokens": [5] * 3, "critic/score/mean": [0.1] * 3}
    for steps in ([0, 10, 20], [1, 2, 4], [41, 42, 43]):
        path = write_csv(tmp_path / "x.csv", columns | {"_step": steps})
        for named in ((None, None), tuple(columns)):
            with pytest.raises(ValueError, match=r"of steps before it is missing; export every step"):
                read_curves([path], *named)
    evaluated = write_csv(tmp_path / "x.csv", {"step": [0, 50, 200], "cost": [1, 50, 150], "val": [0.1] * 3})
    (curve,) = read_curves([evaluated], "cost", "val", per_row=True)  # a row has what was spent since the one before
    assert curve.points.compute.tolist() == [1, 51, 201]


def test_a_chart_of_wandb_has_a_curve_a_run(tmp_path: Path) -> None:
    columns = {
        "num_tokens": [1, 2],
        "a - b - reward": [0.1, ""],
        "a - b - reward__MIN": [0.0, ""],
        "a - b - reward__MAX": [0.2, ""],
        "c - reward": [0.3, 0.4],
    }
    path = write_csv(tmp_path / "chart.csv", columns)
    first, second = read_curves([path])
    assert (first.name, first.points.score.tolist()) == ("a - b", [0.1])
    assert (second.name, second.points.score.tolist(), second.compute) == ("c", [0.3, 0.4], "num_tokens")
    (joined,) = read_curves([f"seeds={path}"])
    assert joined.points.run.tolist() == [0, 1, 1]


def test_a_table_with_a_dash_in_a_column_is_no_chart_where_it_has_what_is_read(tmp_path: Path) -> None:
    columns: dict[str, list[Any]] = {"time - seconds": [5, 6], "num_tokens": [1, 2], "reward": [0.1, 0.2]}
    path = write_csv(tmp_path / "x.csv", columns)
    (curve,) = read_curves([path])
    assert (curve.name, curve.compute, curve.score, curve.points.compute.tolist()) == ("x", *list(columns)[1:], [1, 2])
    (curve,) = read_curves([path], "time - seconds", "reward")
    assert curve.points.compute.tolist() == [5, 6]


@pytest.mark.parametrize(
    ("names", "asked", "words"),
    [
        (["a - x", "b - y"], {}, "name its columns by --compute and --score; it has a - x, b - y"),
        (["a", "b", "time - seconds"], {}, "name its columns by --compute and --score; it has a, b, time - seconds"),
        (["Step", "a - x"], {"score": "nowhere"}, "no column nowhere"),
        (["Step", "a - x"], {"compute": "nowhere"}, "no column nowhere"),
        (["Step", "a - _step"], {}, "name its columns by --compute and --score"),
        (["Step", "a - x"], {"per_row": True}, "can't be added up over a chart"),
        (["perf/total_num_tokens", "a - x"], {}, "can't be added up over a chart"),
        (["Step", "a - x"], {}, "over Step, which is no compute; export the chart over what counts it"),
        (["Relative Time (Process)", "a - x"], {}, "give --compute 'Relative Time (Process)' to fit over that"),
        (["train/global_step", "a - x"], {}, "over train/global_step, which is no compute"),
        (["Wall Time", "a - x"], {"score": "x"}, "over Wall Time, which is no compute"),
    ],
)
def test_what_is_no_chart_or_lacks_what_is_read_is_refused(
    names: list[str], asked: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = write_csv(tmp_path / "x.csv", {name: [1, 2] for name in names})
    with pytest.raises(ValueError, match=r"x\.csv: ") as error:
        read_curves([path], **asked)
    assert words in str(error.value)


def test_wandbs_own_metrics_in_a_chart_are_read_only_where_they_are_named(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "x.csv", {"Step": [1, 2], "a - reward": [0.1, 0.2], "a - _runtime": [3, 4]})
    for score, values in ((None, [0.1, 0.2]), ("_runtime", [3, 4])):
        (curve,) = read_curves([path], "Step", score)
        assert (curve.points.score.tolist(), curve.compute) == (values, "Step")


def metrics(step: int) -> dict[str, Any]:
    return {"step": step, "reward_mean": 0.1 * step, "response_tokens": 10, "model_flops": 4.0, "generation_flops": 1.0}


def test_a_runs_folder_has_rewards_by_flops_and_scores_of_the_weights_that_a_step_begins_with(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "run")
    for step in range(3):
        tracker.log(metrics(step))
    for step in (0, 2):
        scores.write(tmp_path / "run", step, [evaluation(0.5, "a"), evaluation(0.7, "b")])
    (curve,) = read_curves([str(tmp_path / "run")])
    assert (curve.points.compute.tolist(), curve.points.score.tolist()) == ([0, 5, 10], [0.0, 0.1, 0.2])
    (curve,) = read_curves([str(tmp_path / "run")], "spent_tokens", "score")
    assert (curve.points.compute.tolist(), curve.points.score.tolist()) == ([0, 20], [0.6, 0.6])


def test_the_tokens_of_a_runs_folder_are_those_of_its_metrics_with_stage_1(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "run")
    for step in range(3):
        tracker.log(metrics(step) | {"spent_tokens": 700 + 10 * (step + 1)})
    for step in (0, 3):
        scores.write(tmp_path / "run", step, [evaluation(0.5)])
    (curve,) = read_curves([str(tmp_path / "run")], "spent_tokens")
    assert curve.points.compute.tolist() == [line["spent_tokens"] - 10 for line in read_metrics(tmp_path / "run")]
    (curve,) = read_curves([str(tmp_path / "run")], "spent_tokens", "score")
    assert curve.points.compute.tolist() == [700, 730]


def test_a_runs_folder_has_the_score_of_its_last_weights_as_a_study_has(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "run")
    for step in range(4):
        tracker.log(metrics(step) | {"truncated": 0.0, "peak_memory_bytes": [0], "seconds": {}})
    for step in (0, 2, 4):
        scores.write(tmp_path / "run", step, [evaluation(0.1 * step)])
    course = course_of(Run("x", 0), tmp_path / "run", None)
    (curve,) = read_curves([str(tmp_path / "run")], score="score")
    of_study = [(each.spent.flops, each.score) for each in course if each.score is not None]
    assert list(zip(curve.points.compute, curve.points.score, strict=True)) == of_study
    assert curve.points.compute.tolist() == [0, 10, 20]


def test_steps_of_a_run_that_lack_a_number_have_cost_what_they_say(tmp_path: Path) -> None:
    lines = [
        '{"step": 0}',
        '{"step": 1, "reward_mean": NaN, "model_flops": 4.0, "seconds": null, "response_tokens": null}',
        '{"step": 2, "reward_mean": 0.5, "model_flops": 4.0, "generation_flops": null}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    scores.write(tmp_path, 2, [evaluation(0.7)])
    for score, points in ((None, ([4], [0.5])), ("score", ([4], [0.7]))):
        (curve,) = read_curves([str(tmp_path)], score=score)
        assert (curve.points.compute.tolist(), curve.points.score.tolist()) == points
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(ValueError, match="no row has both spent_flops and reward_mean"):
        read_curves([str(tmp_path)])


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([2, 3], "line 1: expected step 0, got 2"),
        ([0, 1, 4], "line 3: expected step 2, got 4"),
        ([0, 1, 1, 2], "line 3: expected step 2, got 1"),
    ],
    ids=["late", "missing", "repeated"],
)
def test_a_runs_folder_whose_steps_do_not_add_up_is_refused(steps: list[int], words: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(metrics(step)) + "\n" for step in steps))
    with pytest.raises(ValueError, match=words):
        read_curves([str(tmp_path)])


def test_a_comparison_has_a_curve_a_method_and_a_run_a_seed(tmp_path: Path) -> None:
    columns = {"method": list("aabb"), "seed": [0, 1, 0, 0], "spent_flops": [3, 4, 5, 6], "reward_mean": [0, 1, 2, 3]}
    write_csv(tmp_path / "compare.csv", columns)
    first, second = read_curves([str(tmp_path)])
    assert (first.name, first.points.run.tolist(), second.points.run.tolist()) == ("a", [0, 1], [0, 0])


@pytest.mark.parametrize("measure", ["tokens", "flops", "seconds"])
def test_what_is_of_the_weights_before_a_step_is_read_beside_what_these_have_cost(measure: str, tmp_path: Path) -> None:
    columns = {"method": ["a"] * 2, "seed": [0] * 2, "reward_mean": [0.3, 0.4], "score_before": [0.1, 0.2]}
    costs = {f"spent_{each}": [3, 4] for each in ("tokens", "flops", "seconds")}
    before = {f"{name}_before": [0, 3] for name in costs}
    write_csv(tmp_path / "compare.csv", columns | costs)
    with pytest.raises(ValueError, match=f"add --compute spent_{measure}_before, which"):
        read_curves([str(tmp_path)], f"spent_{measure}", "score_before")
    (curve,) = read_curves([str(tmp_path)], f"spent_{measure}")
    assert curve.points.compute.tolist() == [3, 4]  # of an older version
    write_csv(tmp_path / "compare.csv", columns | costs | before)
    for score, values in (("reward_mean", [0.3, 0.4]), ("score_before", [0.1, 0.2])):
        with pytest.raises(ValueError, match=f"--score {score}: .* add --compute spent_{measure}_before$"):
            read_curves([str(tmp_path)], f"spent_{measure}", score)
        for compute in (f"spent_{measure}_before", None):
            (curve,) = read_curves([str(tmp_path)], compute, score)
            assert (curve.points.compute.tolist(), curve.points.score.tolist()) == ([0, 3], values)


def test_a_comparisons_curves_stay_apart_under_a_name(tmp_path: Path) -> None:
    columns = {"method": list("ab"), "seed": [0, 0], "spent_flops": [3, 4], "reward_mean": [0, 1]}
    for number in range(2):
        write_csv(tmp_path / f"{number}.csv", columns)
    curves = read_curves([f"mine={tmp_path / '0.csv'}", f"mine={tmp_path / '1.csv'}"])
    assert [(curve.name, curve.points.run.tolist()) for curve in curves] == [("mine: a", [0, 1]), ("mine: b", [0, 1])]


def test_tables_are_one_curve_only_where_they_are_given_one_name(tmp_path: Path) -> None:
    tables, runs = [], []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        tables.append(write_csv(tmp_path / folder / "log.csv", {"num_tokens": [1], "reward": [0.1]}))
        Tracker(tmp_path / folder / "run").log(metrics(0))
        runs.append(str(tmp_path / folder / "run"))
    comparisons = [
        write_csv(tmp_path / f"{number}.csv", {"method": ["a"], "seed": [0], "spent_flops": [1], "reward_mean": [1]})
        for number in range(2)
    ]
    words = r"both have a curve '\w+'; give them names, as A=\S+ and B=\S+, or one name"
    for first, second in (
        tables,
        runs,
        comparisons,
        (f"log={tables[0]}", tables[1]),
        (f"a={tables[0]}", comparisons[0]),
    ):
        with pytest.raises(ValueError, match=words):
            read_curves([first, second])
    assert [curve.name for curve in read_curves([f"x={tables[0]}", tables[1]])] == ["x", "log"]
    (curve,) = read_curves([f"x={tables[0]}", f"x={tables[1]}"])
    assert curve.points.run.tolist() == [0, 1]


def test_a_table_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    columns = {"method": ["a"], "seed": [0], "spent_flops": [1], "reward_mean": [1]}
    path = write_csv(tmp_path / "compare.csv", columns)
    (tmp_path / "link.csv").symlink_to(path)
    for other in (path, str(tmp_path), str(tmp_path / "link.csv"), f"{tmp_path}/../{tmp_path.name}/compare.csv"):
        with pytest.raises(ValueError, match=r"the same table as .*; give it once"):
            read_curves([f"x={path}", f"x={other}"])
    with pytest.raises(ValueError, match="the same table"):
        read_curves([path] * 2)


def test_a_copy_of_a_table_is_refused_as_the_table_given_twice_is(tmp_path: Path) -> None:
    columns: dict[str, list[Any]] = {"num_tokens": [1, 2], "reward": [0.1, 0.2]}
    first, second = (write_csv(tmp_path / f"{name}.csv", columns) for name in "ab")
    with pytest.raises(ValueError, match=r"x: \S+b\.csv has the points of \S+a\.csv, all of which would count twice"):
        read_curves([f"x={first}", f"x={second}"])
    assert len(read_curves([first, second])) == 2
    seeds = {"method": list("aaaa"), "seed": [0, 0, 1, 1], "spent_flops": [1, 2, 1, 2], "reward_mean": [0.0] * 4}
    (curve,) = read_curves([write_csv(tmp_path / "compare.csv", seeds)])  # seeds that never learn may well be equal
    assert len(curve.points) == 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "a,b\n1,2\n",
            "not a table of a trainer that is known; name its columns by --compute and --score; it has a, b",
        ),
        ("num_tokens,reward\n", "expected a header and a row a step"),
        ("num_tokens,reward\n1,high\n", "row 1, reward: expected a number, got 'high'"),
        ("num_tokens,reward\n1,\n", "no row has both num_tokens and reward"),
        ("num_tokens,reward\n5,1\n3,1\n", "row 2: num_tokens falls from 5 to 3"),
        ("num_tokens,reward\n1,1\n1e308,1\n", "row 2, num_tokens: expected a number up to 1e+100, got 1e+308"),
        ("num_tokens,reward\n1,-1e202\n", "row 1, reward: expected a number up to 1e+100, got -1e+202"),
        ("num_tokens,reward\n1,inf\n", "row 1, reward: expected a number up to 1e+100, got inf"),
        ("num_tokens,reward\n1,1\n1,1\n", "row 2: num_tokens and reward are those of the point before, which would"),
        ("num_tokens,reward\n-5,1\n", "row 1: num_tokens is -5"),
        ("\0\xff", "expected a header and a row a step"),
        ("num_tokens,reward\n1,2,\n1,1000,0.5\n", "row 2 has more cells than the header has columns"),
    ],
)
def test_a_table_that_can_not_be_read_is_one_clear_error(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(ValueError, match=r"x\.csv") as error:
        read_curves([str(tmp_path / "x.csv")])
    assert words in str(error.value)


def test_an_integer_of_jsonl_that_no_float_holds_is_named_by_its_row_and_column(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(f'{{"num_tokens": 1{"0" * 400}, "reward": 1}}')
    with pytest.raises(ValueError, match=r"x\.jsonl, row 1, num_tokens: expected a number, got 1000"):
        read_curves([str(tmp_path / "x.jsonl")])


def test_a_text_with_a_line_separator_in_it_ends_no_line_of_jsonl(tmp_path: Path) -> None:
    line = {"num_tokens": 1, "reward": 0.5, "text": "a\u2028b\u2029c\x85d"}
    (tmp_path / "x.JSONL").write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_curves([str(tmp_path / "x.JSONL")])[0].points.score.tolist() == [0.5]


def test_a_table_that_is_read_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    path = write_csv(tmp_path / "fit.csv", {"num_tokens": [*range(1, 21)], "reward": [*range(20)]})
    before = (tmp_path / "fit.csv").read_bytes()
    for source in (path, f"a={path}", str(tmp_path / "link" / "fit.csv")):
        with pytest.raises(ValueError, match=r"--out .*fit\.csv is read, and would be written over"):
            scale_fit([source], tmp_path, None, None, per_row=False, tolerance=0.02)
    assert (tmp_path / "fit.csv").read_bytes() == before and not (tmp_path / "fit.md").exists()


def test_a_folder_in_the_place_of_a_result_is_named_before_anything_is_written(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "x.csv", {"num_tokens": [*range(1, 21)], "reward": [*range(20)]})
    (tmp_path / "out" / "fit.png").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"--out .*out: fit\.png is a folder there; give another, or remove it"):
        scale_fit([path], tmp_path / "out", None, None, per_row=False, tolerance=0.02)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["fit.png"]


def test_which_law_is_nearest_does_not_depend_on_the_unit_of_the_scores() -> None:
    compute = np.arange(1.0, 61.0)
    score = 0.8 / (1 + (12 / compute) ** 2) + 0.002 * np.sin(17 * compute)
    runs = np.zeros(60, dtype=int)
    best = [extrapolate("x", Points(compute, score * unit, runs), 0.02 * unit).best for unit in (1e-9, 1.0, 1e6)]
    assert [law and law.law for law in best] == ["sigmoid"] * 3


def test_the_state_that_trl_leaves_is_a_table(tmp_path: Path) -> None:
    state = tmp_path / "trainer_state.json"
    state.write_text(json.dumps({"log_history": [{"num_tokens": 9, "reward": 0.5}, {"train_runtime": 3.0}]}))
    assert read_curves([str(state)])[0].points.compute.tolist() == [9]
    for other in ("{}", "[]", "3", '{"log_history": {}}', '{"log_history": [1]}'):
        state.write_text(other)
        with pytest.raises(ValueError, match=r"trainer_state\.json: expected a"):
            read_curves([str(state)])


def test_columns_of_one_name_and_names_that_cant_be_printed_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("num_tokens,reward,reward\n1,2,3\n")
    with pytest.raises(ValueError, match="more than one column reward"):
        read_curves([str(tmp_path / "x.csv")])
    path = write_csv(tmp_path / "y.csv", {"num_tokens": [1], "reward": [1]})
    with pytest.raises(ValueError, match=r"can't print the curve's name 'a\\x1b\[31m'"):
        read_curves([f"a\x1b[31m={path}"])
    with pytest.raises(ValueError, match="--tolerance: expected a number of 0 or more, got inf"):
        scale_fit([path], tmp_path, None, None, per_row=False, tolerance=math.inf)


def test_what_is_no_table_or_lacks_a_named_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.csv: there is no such file or folder; give a CSV"):
        read_curves([f"x={tmp_path / 'none.csv'}"])
    with pytest.raises(ValueError, match=r"no metrics\.jsonl"):
        read_curves([str(tmp_path)])
    (tmp_path / "x.jsonl").write_text('{"num_tokens": 1, "reward": 2}\nno\n')
    with pytest.raises(ValueError, match=r"can't read the table: line 2, character 1: .*; mend it, or give a CSV"):
        read_curves([str(tmp_path / "x.jsonl")])
    (tmp_path / "x.jsonl").write_text('{"num_tokens": 1, "reward": 2}\n')
    with pytest.raises(ValueError, match="no column nowhere"):
        read_curves([str(tmp_path / "x.jsonl")], score="nowhere")
    path = write_csv(tmp_path / "y.csv", {"train/num_tokens": [1], "train/reward": [1]})
    with pytest.raises(ValueError, match="its tables count different things"):
        read_curves([f"a={path}", f"a={tmp_path / 'x.jsonl'}"])


# --- results


def test_the_files_say_the_same_and_what_is_not_known_is_empty(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, end in (("whole", 1.0), ("young", 0.2)):
        points = study(0, responses=4096, end=end, runs=1)
        columns = {"num_tokens": points.compute.tolist(), "reward": points.score.tolist()}
        write_csv(tmp_path / f"{name}.csv", columns)
    sources = [str(tmp_path / "whole.csv"), str(tmp_path / "young.csv")]
    unfitted = write_csv(tmp_path / "few | early.csv", {"num_tokens": list(range(10, 21)), "reward": [0.5] * 11})
    scale_fit(sources, tmp_path / "out", None, None, per_row=False, tolerance=0.05)
    tree = json.loads((tmp_path / "out" / "fit.json").read_text())
    whole, young = tree["curves"]
    assert (whole["verdict"], whole["compute"], len(whole["late_means"])) == ("extrapolates", "num_tokens", 10)
    asymptote = whole["laws"][0]["numbers"]["asymptote"]
    assert asymptote["interval"][0] < ASYMPTOTE < asymptote["interval"][1]
    assert young["laws"][0]["numbers"]["asymptote"]["interval"] is None
    rows = list(csv.DictReader((tmp_path / "out" / "fit.csv").open()))
    assert [row["law"] for row in rows] == ["sigmoid", "log-linear", "constant"] * 2
    assert float(rows[0]["asymptote"]) == asymptote["value"] and rows[3]["asymptote"] == ""
    text = capsys.readouterr().out
    assert "- young (reward by num_tokens)" in text and "asymptote: not known; the scores have not levelled off" in text
    assert (tmp_path / "out" / "fit.png").read_bytes()[:4] == b"\x89PNG"
    scale_fit([*sources, unfitted], tmp_path / "out", None, None, per_row=False, tolerance=0.05)
    tree, text = json.loads((tmp_path / "out" / "fit.json").read_text()), capsys.readouterr().out
    near = sum(
        abs(late[law["law"]] - late["score"]) <= 0.05
        for curve in tree["curves"]
        for law in curve["laws"]
        if law["law"] == curve["best_law"]
        for late in curve["late_means"]
    )
    verdicts = [curve["verdict"] for curve in tree["curves"]]
    assert verdicts[2] == "can't be told" and len(tree["curves"][2]["late_means"]) == 10
    assert f"Of 3 curves {verdicts.count('extrapolates')} can be extrapolated" in text
    assert f"{near} of 30 later means are within 0.05 of the nearest law." in text


@pytest.mark.parametrize("is_study", [True, False])
def test_runs_that_failed_are_counted_and_a_curve_without_any_run_is_named(
    is_study: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, curve = ("scale", "cell") if is_study else ("compare", "method")
    columns = {"seed": [0] * 12, "spent_flops": list(range(12)), "reward_mean": [0.5] * 12}
    write_csv(tmp_path / f"{name}.csv", {curve: ["astar"] * 12} | columns | {"score": [0.5, 0.6] * 6})
    states = {"0": {"state": "finished"}, "1": {"state": "failed", "error": "x"}, "2": {"state": "waiting"}}
    cells = ("astar", "grpo")
    runs = [{"method": cell, "seed": int(seed)} | state for cell in cells for seed, state in states.items()]
    tree = {"cells": {cell: {"runs": states} for cell in cells}} if is_study else {"runs": runs}
    (tmp_path / f"{name}.json").write_text(json.dumps(tree))
    scale_fit([str(tmp_path)], tmp_path / "out", None, None, per_row=False, tolerance=0.05)
    curves = json.loads((tmp_path / "out" / "fit.json").read_text())["curves"]
    assert [(each["name"], each["runs"], each["asked_runs"]) for each in curves] == [("astar", 1, 3), ("grpo", 0, 3)]
    rows = list(csv.DictReader((tmp_path / "out" / "fit.csv").open()))
    assert [(row["runs"], row["asked_runs"]) for row in rows] == [("1", "3")] * 3 + [("0", "3")] * 3
    text = capsys.readouterr().out
    assert (tmp_path / "out" / "fit.md").read_text() in text
    assert "| grpo | 0 of 3 | 0 | can't be told |" in text
    assert "1 of 3 runs have points; the others failed, or have not ended." in text
    (tmp_path / f"{name}.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"{name}\.json: can't read which runs {name}\.csv was to have"):
        read_curves([str(tmp_path)])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("compute", "score"),
    [
        ([1.0], [1.0]),
        ([0.0] * 12, [0.5, 0.6] * 6),
        ([1e98 * number for number in range(12)], [1e100] * 12),
        (list(range(12)), [1e100, -1e100] * 6),
    ],
    ids=["a point", "no compute", "huge and level", "huge and rough"],
)
def test_whatever_is_read_is_fitted_or_refused_and_drawn_without_a_warning(
    compute: list[float], score: list[float], tmp_path: Path
) -> None:
    path = write_csv(tmp_path / "price_$_of_$.csv", {"num_tokens": compute, "reward": score})
    whole = write_csv(tmp_path / "whole.csv", {"num_tokens": list(range(12)), "reward": [0.5, 0.6] * 6})
    scale_fit([path, whole], tmp_path / "out", None, None, per_row=False, tolerance=0.05)
    curve, _ = json.loads((tmp_path / "out" / "fit.json").read_text())["curves"]
    assert curve["points"] == len(compute) and (tmp_path / "out" / "fit.png").exists()


def test_panels_of_the_picture_have_whole_names_and_labels_and_no_title_lies_over_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    folder = tmp_path / "in"
    folder.mkdir()
    columns = {"num_tokens": list(range(12)), "reward": [0.5, 0.6] * 6}
    names = ["optim.lr=1e-6,astar.beta2=0.001,train.batch_size=256," * 2 + f"seed={seed}" for seed in range(4)]
    tables = [write_csv(folder / f"{name}.csv", columns) for name in names]
    for count in (1, 4):
        scale_fit(tables[:count], tmp_path / "out", None, None, per_row=False, tolerance=0.05)
        figure = pyplot.gcf()
        shown = [axes for axes in figure.axes if axes.get_visible()]
        titles = [axes.get_title().replace("\n", "") for axes in shown]
        assert [title.partition(": ")[0] for title in titles] == names[:count]
        assert {(axes.get_xlabel(), axes.get_ylabel()) for axes in shown} == {("num_tokens", "reward")}
        (heading,) = (text.get_window_extent() for text in figure.texts)
        assert not any(axes.title.get_window_extent().overlaps(heading) for axes in shown)
        assert heading.x0 >= 0 and heading.x1 <= figure.bbox.x1
