"""`astar show`: a page of a run, looked at in a real browser, with rollouts that would like to be more than text."""

import dataclasses
import itertools
import json
import math
import re
import shutil
import subprocess
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import samples
import shown_run
import test_train
from PIL import Image

from astar_megatron import show
from astar_megatron.data import rollout_files
from astar_megatron.pages import page, panels
from astar_megatron.pages.page import aligned, page_of
from astar_megatron.run import scores
from astar_megatron.run.tracking import read_metrics
from astar_megatron.types import Prompt

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_a_browser = pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome on the PATH")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shown_run.write_run(tmp_path_factory.mktemp("show") / "additions")


@pytest.fixture(scope="module")
def shown(run: Path) -> Path:
    show.main(run, None)
    return run / show.PAGE_FILE


def data_of(file: Path) -> dict[str, Any]:
    text = file.read_text(encoding="utf-8")
    return json.loads(text.partition('id="data">')[2].partition("</script>")[0])


# --- in a browser


class Seen(HTMLParser):
    """What a page became: its tags in order, and the texts of elements by their tag, class and id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[tuple[str, list[str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag in ("meta", "img", "input", "br", "link"):
            return
        known = dict(attributes)
        names = [tag, *(known.get("class") or "").split(), *([known["id"] or ""] if "id" in known else [])]
        self._open.append((tag, names))
        for name in names:
            self.texts.setdefault(name, []).append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        for name in {name for _, names in self._open for name in names}:
            self.texts[name][-1] += data


@dataclass(frozen=True)
class Browser:
    """A page in a headless browser of its own; the fragment of its address filters."""

    profile: Path

    def _run(self, *arguments: str) -> str:
        assert BROWSER is not None
        command = [
            BROWSER,
            "--headless=new",
            "--no-sandbox",
            "--disable-dev-shm-usage",
            "--disable-gpu",
            "--hide-scrollbars",
        ]
        command += [f"--user-data-dir={self.profile}", "--virtual-time-budget=5000", *arguments]
        done = subprocess.run(command, capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        return done.stdout.decode()

    def dom(self, file: Path, fragment: str) -> str:
        return self._run("--dump-dom", f"{file.as_uri()}#{fragment}")

    def see(self, file: Path, fragment: str = "") -> Seen:
        return Seen(self.dom(file, fragment))

    def photograph(self, file: Path, fragment: str, picture: Path) -> Image.Image:
        self._run("--window-size=1280,2600", f"--screenshot={picture}", f"{file.as_uri()}#{fragment}")
        return Image.open(picture).convert("RGB")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    return Browser(tmp_path_factory.mktemp("profile"))


@in_a_browser
def test_a_browser_draws_curves_health_timeline_and_rollouts(shown: Path, browser: Browser) -> None:
    seen = browser.see(shown)
    titles = seen.texts["h3"]
    assert {"Regression: slope and R²", "Reward", "Evaluation", "Seconds of each step, by part"} <= set(titles)
    assert seen.tags.count("figure") == len(titles) - 1 and seen.tags.count("path") >= len(titles)
    assert seen.texts["lane"] == ["the run is at", "engines busy", "ranks busy"]
    assert "policy" in seen.texts["gantt"][0] and "engines idle" in seen.texts["timeline-words"][0]
    assert seen.texts["count"] == ["96 of 96 rollouts match"] and seen.texts["page"] == ["page 1 of 2"]
    assert seen.tags.count("details") == 50


@in_a_browser
def test_a_browser_tells_the_seconds_of_a_step_that_no_curve_draws(
    run: Path, tmp_path: Path, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "_MOST_CURVE_POINTS", 6)
    show.main(run, tmp_path / "x.html")
    assert data_of(tmp_path / "x.html")["x"] == [1, 3, 5, 7, 9, 11]
    seen = browser.see(tmp_path / "x.html", "reward>=0&timeline=10")
    assert "engines idle" in seen.texts["timeline-words"][0]
    assert "Seconds of each step, by part: means of 2 steps" in seen.texts["h3"]
    assert any("One in 2 steps is drawn" in note for note in seen.texts["note"])


@in_a_browser
def test_a_link_filters_by_step_reward_length_and_text(run: Path, shown: Path, browser: Browser) -> None:
    rows = [(step, row) for step in range(12) for row in rows_of(run, step)]

    def count(chosen: Callable[[int, Any], bool]) -> str:
        return f"{sum(chosen(*row) for row in rows)} of 96 rollouts match"

    asked = {
        "step=3": count(lambda step, row: step == 3),
        "step>=3&step<=5&reward>=1": count(lambda step, row: 3 <= step <= 5 and row.reward >= 1),
        "length<=12&reward<=0.5": count(lambda step, row: len(row.pieces) <= 12 and row.reward <= 0.5),
        "prompt=WHAT%20IS%202&response=the%20answer": count(
            lambda step, row: "What is 2" in row.prompt and "the answer" in row.text
        ),
        "prompt=100%&constructor=1&timeline=constructor": "0 of 96 rollouts match",
    }
    assert len(set(asked.values())) == 5
    for fragment, words in asked.items():
        assert browser.see(shown, fragment).texts["count"] == [words], fragment


@in_a_browser
def test_tokens_are_coloured_by_their_log_ratio(run: Path, shown: Path, browser: Browser) -> None:
    dom = browser.dom(shown, "step=11&order=drift&open")
    row = max(rows_of(run, 11), key=lambda row: abs(sum(row.logratios)))
    assert Seen(dom).texts["token"][: len(row.pieces) - 1] == list(row.pieces[:-1])
    titles = [float(title) for title in re.findall(r'title="([+-]?[\d.]+) nats, token \d+"', dom)]
    assert titles == pytest.approx(list(row.logratios), abs=0.006)
    colours = re.findall(r"background: rgba\(var\(--(above|below)\), ([\d.]+)\)", dom.partition('class="response"')[2])
    assert [colour for colour, _ in colours[: len(titles)]] == ["above" if title > 0 else "below" for title in titles]


@in_a_browser
def test_what_a_model_says_never_becomes_html_or_script(shown: Path, browser: Browser) -> None:
    assert "pwned" in shown.read_text(encoding="utf-8") and "<img" not in shown.read_text(encoding="utf-8")
    seen = browser.see(shown, "step=0&response=pwned&open")
    assert seen.texts["title"][0] == "additions: 12 steps" and "img" not in seen.tags
    assert seen.tags.count("script") == 2  # the data and the page's own
    assert shown_run.HOSTILE in seen.texts["response"][0]


@in_a_browser
def test_the_policy_of_a_page_runs_no_other_script(shown: Path, browser: Browser, tmp_path: Path) -> None:
    text = shown.read_text(encoding="utf-8")
    planted = tmp_path / "planted.html"
    planted.write_text(text.replace("<h2>", "<script>document.title = 'pwned'</script><h2>"), encoding="utf-8")
    assert browser.see(planted).texts["title"][0] == "additions: 12 steps"
    planted.write_text(re.sub(r"<meta http-equiv.*", "", planted.read_text(encoding="utf-8")), encoding="utf-8")
    assert browser.see(planted).texts["title"][0] == "pwned"  # it is the policy that holds it back


@in_a_browser
@pytest.mark.parametrize(("theme", "light"), [("light", True), ("dark", False)])
def test_a_photograph_shows_a_page_that_is_not_empty(
    theme: str, light: bool, shown: Path, browser: Browser, tmp_path: Path
) -> None:
    picture = browser.photograph(shown, f"theme={theme}&open", tmp_path / "x.png")
    colours = picture.getcolors(1 << 24) or []
    assert len(colours) > 50
    count, ground = max(colours)
    assert isinstance(ground, tuple) and (sum(ground) > 600) == light
    assert count < 0.97 * picture.width * picture.height


@in_a_browser
def test_runs_with_nothing_to_draw_have_a_page_that_says_so(browser: Browser, tmp_path: Path) -> None:
    empty = shown_run.write_run(tmp_path / "empty", steps=0)
    show.main(empty, tmp_path / "empty.html")
    seen = browser.see(tmp_path / "empty.html")
    assert "No step is done yet." in seen.texts["summary"][0] and "keeps no rollouts" in seen.texts["count"][0]
    without = shown_run.write_run(tmp_path / "without", steps=1, keep=0)
    show.main(without, None)
    seen = browser.see(without / show.PAGE_FILE)
    assert "keeps no rollouts" in seen.texts["count"][0] and "Reward" in seen.texts["h3"]


@in_a_browser
def test_curves_that_differ_by_rounding_or_are_huge_are_drawn_with_all_that_follows(
    browser: Browser, tmp_path: Path
) -> None:
    ends = {
        "value_mean": (0.6814488519636533, 0.6814488519636535),  # of one table in the step's order
        "entropy": (1e15, 1e15 + 0.125),
        "lr": (1e-6, math.nextafter(1e-6, 1)),
        "kl_token": (0.0, 5e-324),
        "grad_norm": (-1.7e308, 1.7e308),
        "engine_gap": (1e308, 1e308),
        "residual_std": (0.0, 0.0),
    }
    run = shown_run.write_run(tmp_path / "run", steps=6)
    lines = [line | {key: pair[line["step"] % 2] for key, pair in ends.items()} for line in read_metrics(run)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    show.main(run, None)
    seen = browser.see(run / show.PAGE_FILE)
    assert seen.texts["count"] == ["48 of 48 rollouts match"] and seen.texts["lane"]
    assert {"Value", "Entropy a token", "Learning rate", "Gradient's norm"} <= set(seen.texts["h3"])


def with_metrics(folder: Path, lines: Sequence[dict[str, Any]]) -> Path:
    """A run of one step of rollouts with these lines of metrics, shown."""
    run = shown_run.write_run(folder, steps=1)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    show.main(run, None)
    return run / show.PAGE_FILE


def figure_of(dom: str, title: str) -> str:
    (figure,) = [part for part in dom.split("<figure")[1:] if f">{title}</h3>" in part]
    return figure.partition("</figure>")[0]


@in_a_browser
def test_every_tick_of_an_axis_has_a_text_of_its_own(browser: Browser, tmp_path: Path) -> None:
    ends = {
        "reward_mean": (0.99901, 0.99909),
        "response_tokens": (1_047_700, 1_049_400),
        "entropy": (0.0312, 0.0318),
        "loss": (1e30, 1.0001e30),
        "kl_token": (-2e-7, 3e-7),
        "mfu": (0.0, 0.3),
    }
    lines = [{"step": step, **{key: pair[step] for key, pair in ends.items()}} for step in (0, 1)]
    dom = browser.dom(with_metrics(tmp_path / "run", lines), "")
    texts = [re.findall(r'text-anchor="end">([^<]*)<', part.partition("</figure>")[0]) for part in dom.split("<figure")]
    assert len(texts) == 1 + len(ends)
    for of_axis in texts[1:]:
        numbers = [float(text) for text in of_axis]
        assert len(set(of_axis)) == len(of_axis) >= 2, of_axis
        apart = [after - before for before, after in itertools.pairwise(numbers)]
        assert apart == pytest.approx([apart[0]] * len(apart)), of_axis
    assert ["0.0", "0.1", "0.2", "0.3"] in texts  # no digit more than they need


MEASURES = """<script>
for (const text of document.querySelectorAll("svg text")) text.setAttribute("data-left", text.getBBox().x);
</script>"""


@in_a_browser
def test_no_tick_begins_left_of_its_picture(browser: Browser, tmp_path: Path) -> None:
    ends = {"reward_mean": (0.99901, 0.99909), "loss": (1e30, 1.0001e30), "grad_norm": (-8.525e12, -8.526e12)}
    lines = [{"step": step, **{key: pair[step] for key, pair in ends.items()}} for step in (0, 1)]
    file = with_metrics(tmp_path / "run", lines)
    without_policy = re.sub("<meta http-equiv[^>]*>", "", file.read_text())  # which lets no script measure
    file.write_text(without_policy + MEASURES)
    lefts = re.findall('text-anchor="end" data-left="([^"]*)"', browser.dom(file, ""))
    assert len(lefts) >= 6 and min(map(float, lefts)) >= 0


@in_a_browser
def test_a_curve_is_cut_where_a_step_or_its_value_is_missing(browser: Browser, tmp_path: Path) -> None:
    steps = [step for step in range(60) if not 20 <= step < 30]
    lines: list[dict[str, Any]] = [{"step": step, "reward_mean": step / 60, "loss": 1.0} for step in steps]
    for line in lines:
        if line["step"] in (9, 11):
            line["loss"] = None
        if line["step"] % 10 == 0:
            line["eval"] = {"a": {"greedy": 0.5}}
    dom = browser.dom(with_metrics(tmp_path / "run", lines), "")
    drawn = {}
    for title in ("Reward", "Loss", "Evaluation"):
        figure = figure_of(dom, title)
        (path,) = re.findall(r'<path d="([^"]*)"', figure)
        drawn[title] = (path.count("M"), path.count("L"), figure.count("<circle"))
    assert drawn == {"Reward": (2, 48, 0), "Loss": (4, 44, 1), "Evaluation": (1, 4, 5)}


@in_a_browser
def test_what_the_last_weights_scored_is_drawn_behind_the_last_step(browser: Browser, tmp_path: Path) -> None:
    run = shown_run.write_run(tmp_path / "run")  # 12 steps, evaluated before 0, 4 and 8
    scores.write(run, 12, [samples.evaluation(0.9375, "prompts")])
    show.main(run, None)
    (chart,) = [chart for chart in data_of(run / show.PAGE_FILE)["curves"] if chart["title"] == "Evaluation"]
    assert (chart["x"], chart["curves"]["prompts"][-1]) == ([0, 4, 8, 12], 0.9375)
    figure = figure_of(browser.dom(run / show.PAGE_FILE, ""), "Evaluation")
    at = [float(place) for place in re.findall(r'<circle cx="([0-9.]+)"', figure)]
    assert len(at) == 4 and at[3] - at[2] == pytest.approx(at[2] - at[1])
    assert at[3] <= float(re.findall(r'viewBox="0 0 ([0-9.]+)', figure)[0])


@in_a_browser
def test_the_log_ratio_of_a_response_is_no_sum_of_rounded_tokens(browser: Browser, tmp_path: Path) -> None:
    run, count = shown_run.write_run(tmp_path / "run", steps=0), 100
    files = rollout_files.RolloutFiles(run, None, lambda token_ids: " w" * len(token_ids))
    rollouts = [
        samples.rollout(
            Prompt(uid=f"{n}", token_ids=(1,), text="?", answer="!"),
            token_ids=(1,) * count,
            text=" w" * count,
            token_logprobs=(-1.0,) * count,
        )
        for n in range(3)
    ]
    ratios = array("f", [ratio for ratio in (0.004, -0.006, math.nan) for _ in range(count)])
    stats = dataclasses.replace(
        samples.STATS, token_logprobs=ratios, reference_token_logprobs=array("f", [0.0] * 3 * count)
    )
    files.write(0, rollouts, stats)
    show.main(run, None)
    dom = browser.dom(run / show.PAGE_FILE, "order=drift")
    shown = re.findall(rf"<span>{count}</span><span>([^<]*)</span>", dom)
    assert shown == ["\u2013", "-0.600", "0.400"] and "log-ratio, nats" in Seen(dom).texts["head"][-1]


@in_a_browser
@pytest.mark.slow
def test_ten_thousand_rollouts_are_filtered_and_paged(browser: Browser, tmp_path: Path) -> None:
    run = shown_run.write_run(tmp_path / "large", steps=25, batch=400, words=90)
    show.main(run, None)
    seen = browser.see(run / show.PAGE_FILE, "step=24")
    assert seen.texts["count"] == ["400 of 10000 rollouts match"] and seen.tags.count("details") == 50


# --- without one


@pytest.mark.parametrize("name", ["metrics.jsonl", "notes.txt", "rollouts", "show.html"])
def test_a_page_takes_the_place_of_nothing_but_a_page(name: str, tmp_path: Path) -> None:
    run = shown_run.write_run(tmp_path / "run", steps=1)
    (run / "notes.txt").write_text("mine")
    if name == "show.html":
        (run / name).write_text('<!doctype html>\n<html lang="en">\n<p>mine</p>')
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="is there and is no page of `astar show`"):
        show.main(run, run / name)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    show.main(run, tmp_path / "new.html")
    show.main(run, tmp_path / "new.html")


LACKING = [
    '{"step": 0, "version": 0}',
    '{"step": 1, "reward_mean": NaN, "loss": 1e999, "seconds": null, "eval": {"a": {}, "b": null}, "timeline": []}',
    '{"step": 2, "reward_mean": 0.5, "eval": null, "timeline": null, "seconds": {"total": null}}',
    '{"step": 3, "eval": {"a": {"greedy": 0.25}}}',
]


@in_a_browser
def test_lines_of_metrics_that_lack_something_have_a_page_of_the_rest(browser: Browser, tmp_path: Path) -> None:
    run = shown_run.write_run(tmp_path / "run", steps=1)
    (run / "metrics.jsonl").write_text("\n".join(LACKING) + "\n")
    show.main(run, None)
    data = data_of(run / show.PAGE_FILE)
    assert [chart["curves"] for chart in data["curves"]] == [
        {"a": [0.25]},
        {"reward_mean": [None, None, 0.5, None]},
    ]
    seen = browser.see(run / show.PAGE_FILE)
    assert seen.texts["count"] == ["8 of 8 rollouts match"] and "No step of this run" in seen.texts["gantt"][0]


def test_a_reward_that_is_no_number_fails_no_page(tmp_path: Path) -> None:
    run, prompt = shown_run.write_run(tmp_path / "run", steps=1), Prompt(uid="u", token_ids=(1,), text="?", answer="!")
    files = rollout_files.RolloutFiles(run, None, lambda token_ids: f"<{token_ids[0]}>")
    files.write(0, [samples.rollout(prompt, reward=math.nan)], samples.STATS)
    show.main(run, None)
    (row,) = data_of(run / show.PAGE_FILE)["rollouts"]["rows"]
    assert row["reward"] is None


def rows_of(run: Path, step: int) -> list[rollout_files.Trained]:
    return list(rollout_files.read_step(run / "rollouts" / f"step_{step:08d}.parquet"))


def test_a_page_holds_what_the_run_wrote(run: Path, shown: Path) -> None:
    data, lines = data_of(shown), read_metrics(run)
    assert data["x"] == [line["step"] for line in lines] and data["all_rollouts"] == 96
    assert data["seconds"] == [pytest.approx(line["seconds"]) for line in lines]
    (reward,) = [chart for chart in data["curves"] if chart["title"] == "Reward"]
    assert reward["curves"] == {"reward_mean": [line["reward_mean"] for line in lines]}
    assert data["timelines"]["11"] == {"spans": lines[11]["timeline"], "seconds": lines[11]["seconds"]}
    row, wanted = data["rollouts"]["rows"][-1], rows_of(run, 11)[-1]
    assert "".join(data["rollouts"]["pieces"][token] for token in row["tokens"]) == wanted.text
    assert data["rollouts"]["prompts"][row["prompt"]] == [wanted.prompt, wanted.answer]
    assert row["ratios"] == [round(100 * ratio) for ratio in wanted.logratios]
    assert row["logratio"] == pytest.approx(sum(wanted.logratios))


def test_no_evaluation_skipped_step_or_second_is_lost_where_lines_are_too_many_to_draw(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = read_metrics(run)  # evaluated at steps 0, 4 and 8
    lines[6]["skipped_steps"], lines[4]["seconds"]["eval"] = 1, 30.0
    monkeypatch.setattr(page, "_MOST_CURVE_POINTS", 6)
    (tmp_path / "x.html").write_text(page_of(run, lines).text, encoding="utf-8")
    data = data_of(tmp_path / "x.html")
    charts = {chart["title"]: chart for chart in (*data["health"], *data["curves"])}
    assert charts["Reward"]["x"] == [1, 3, 5, 7, 9, 11] and data["ends"] == [0, 11]
    evaluation, left_out = charts["Evaluation"], charts["Steps left out"]
    assert evaluation["x"] == [0, 4, 8] and None not in evaluation["curves"]["prompts"]
    assert left_out["x"] == [1, 3, 5, 6, 7, 9, 11]
    assert left_out["curves"] == {"skipped_steps": [0, 0, 0, 1, 0, 0, 0]}
    assert [seconds.get("eval", 0) for seconds in data["seconds"]] == [0, 0, 15.0, 0, 0, 0]
    assert data["last_seconds"] == lines[-1]["seconds"]["total"]


def test_what_is_too_much_for_a_page_is_left_out_evenly_and_counted(run: Path) -> None:
    lines = read_metrics(run)
    for limits in ({"most_rollouts": 10}, {"most_tokens": 150}):
        made = page_of(run, lines, **limits)
        assert 0 < made.rollouts <= 10 and made.all_rollouts == 96
    assert page_of(run, lines).rollouts == 96


@pytest.mark.parametrize(
    ("text", "pieces", "parts"),
    [
        ("one two", ["one", " two"], ["one", " two"]),
        ("one two", ["one", "two", ""], ["one", " two", ""]),  # a tokenizer that takes the leading space off
        ("a é b", ["a", " ", "\ufffd", "\ufffd", " b"], ["a", " ", "", "é", " b"]),
        ("日", ["\ufffd", "\ufffd", "\ufffd"], ["", "", "日"]),
        ("x", ["nothing", "alike"], ["", "x"]),
        ("", [], []),
        ("", ["", ""], ["", ""]),
    ],
)
def test_the_parts_of_a_text_by_token_are_together_the_text(text: str, pieces: list[str], parts: list[str]) -> None:
    assert aligned(text, pieces) == parts and "".join(parts) == text


def test_every_curve_is_a_key_of_the_metrics() -> None:
    keys = {key for panel in (*panels.HEALTH, *panels.CURVES) for key in panel.keys}
    assert keys <= test_train.KEYS | test_train.KEYS_OF_OTHER_METHODS


def test_the_slope_is_promised_1_with_equal_betas_alone() -> None:
    notes = {panel.title: panel.note for panel in panels.HEALTH}
    assert "with equal betas alone" in notes["Regression: slope and R²"] and "line" not in notes["Residual"]


def test_a_folder_that_is_no_run_is_named(astar: Any, tmp_path: Path) -> None:
    status, _, error = astar("show", tmp_path)
    assert (status, error.count("\n")) == (2, 1) and f"RUN: {tmp_path} is no folder of a run" in error


def test_the_command_says_where_the_page_is(astar: Any, run: Path, tmp_path: Path) -> None:
    status, out, _ = astar("show", run, "--out", tmp_path / "page.html")
    assert status == 0 and "12 steps, 96 rollouts" in out and (tmp_path / "page.html").exists()


def test_a_log_ratio_that_is_not_finite_has_no_number_in_the_page(tmp_path: Path) -> None:
    run, prompt = shown_run.write_run(tmp_path / "run", steps=1), Prompt(uid="u", token_ids=(1,), text="?", answer="!")
    files = rollout_files.RolloutFiles(run, None, lambda token_ids: f"<{token_ids[0]}>")
    stats = dataclasses.replace(samples.STATS, token_logprobs=array("f", (float("nan"), -1.0)))
    files.write(0, [samples.rollout(prompt, text="<5><2>")], stats)
    show.main(run, None)
    (row,) = data_of(run / show.PAGE_FILE)["rollouts"]["rows"]
    assert row["ratios"] == [None, -50] and row["logratio"] is None
