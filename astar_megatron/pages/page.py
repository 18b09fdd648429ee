"""One HTML page of a run: curves, health, timelines and rollouts, in one file that asks no network for anything.

What models and prompts say is data: it stands in the page as JSON, and the script makes text of it, never elements.
The page's policy lets only its own script and style run, by their digests, and lets nothing be loaded.
"""

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from astar_megatron.data import rollout_files
from astar_megatron.data.files import without_nan
from astar_megatron.data.rollout_files import Trained
from astar_megatron.pages import panels
from astar_megatron.run import scores
from astar_megatron.run.tracking import greedy_scores

MOST_ROLLOUTS, MOST_TOKENS = 10_000, 1_000_000  # in a page; more would make a browser slow
MOST_TIMELINES = 500
_MOST_CURVE_POINTS = 2_000
_TEMPLATE = Path(__file__).with_suffix(".html")
_LEAST_PART = 4  # characters that a token may be, where alone it decodes to nothing readable


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """The text of a page, and what of the run stands in it."""

    text: str
    steps: int
    rollouts: int
    all_rollouts: int


def page_of(
    run_dir: Path,
    lines: Sequence[Mapping[str, Any]],
    most_rollouts: int = MOST_ROLLOUTS,
    most_tokens: int = MOST_TOKENS,
) -> Page:
    """Return the page of a run with these lines of metrics. Raises ValueError for damaged rollouts or scores."""
    rollouts, total = _rollouts(run_dir, most_rollouts, most_tokens)
    every = math.ceil(len(lines) / _MOST_CURVE_POINTS) or 1
    groups = [lines[max(0, end - every) : end] for end in range(len(lines), 0, -every)][::-1]
    data = {
        "run": run_dir.resolve().name,
        "steps": len(lines),
        "ends": [line["step"] for line in (*lines[:1], *lines[-1:])],
        "every": every,
        "health": _charts(panels.HEALTH, lines, every),
        "curves": [*_scores(run_dir, lines), *_charts(panels.CURVES, lines, every)],
        "last": {key: value for key, value in (lines[-1] if lines else {}).items() if _is_number(value)},
        "x": [group[-1]["step"] for group in groups],
        "seconds": [_mean_seconds(group) for group in groups],
        "last_seconds": (lines[-1].get("seconds") or {}).get("total") if lines else None,
        "timelines": {
            line["step"]: {"spans": line["timeline"], "seconds": line.get("seconds") or {}}
            for line in lines[-MOST_TIMELINES:]
            if line.get("timeline")
        },
        "rollouts": rollouts,
        "all_rollouts": total,
    }
    title = f"{data['run']}: {len(lines)} steps"
    text = _filled(title, json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False))
    return Page(text=text, steps=len(lines), rollouts=len(rollouts["rows"]), all_rollouts=total)


def is_page(file: Path) -> bool:
    """Return whether a file begins as every page does, down to its policy."""
    begins = _TEMPLATE.read_bytes().partition(b"{{")[0]
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(len(begins)) == begins


def _charts(group: Sequence[panels.Panel], lines: Sequence[panels.Line], every: int) -> list[dict[str, Any]]:
    charts = []
    for panel in group:
        drawn = panels.drawn(lines, every, panel.keys if panel.rare else ())
        if known := panels.curves(panel, drawn):
            charts.append(_chart(panel.title, panel.note, drawn, known, every))
    return charts


def _scores(run_dir: Path, lines: Sequence[panels.Line]) -> list[dict[str, Any]]:
    evaluated = [line for line in lines if greedy_scores(line)]
    end = lines[-1]["step"] + 1 if lines else 0  # what the last weights scored stands in no step's metrics
    if lines and (sets := scores.of_step(run_dir, end)):
        evaluated.append({"step": end, "eval": {evaluation.name: evaluation.metrics() for evaluation in sets}})
    note = "reward of greedy responses"
    any_apart = evaluated[-1]["step"] if evaluated else 0  # which steps are evaluated is no rule of the page's
    return [_chart("Evaluation", note, evaluated, panels.scores(evaluated), any_apart)] if evaluated else []


def _chart(title: str, note: str, lines: Sequence[panels.Line], curves: panels.Curves, apart: int) -> dict[str, Any]:
    """What draws one chart; points more than `apart` steps from each other are not joined."""
    return {"title": title, "note": note, "x": [line["step"] for line in lines], "curves": curves, "apart": apart}


def _mean_seconds(lines: Sequence[panels.Line]) -> dict[str, float]:
    """The seconds of these steps by part, each their mean: what few steps have is left out nowhere."""
    sums: dict[str, float] = {}
    for line in lines:
        for name, seconds in (line.get("seconds") or {}).items():
            sums[name] = sums.get(name, 0.0) + (seconds or 0.0)
    return {name: total / len(lines) for name, total in sums.items()}


def _rollouts(run_dir: Path, most_rollouts: int, most_tokens: int) -> tuple[dict[str, Any], int]:
    """Return the rollouts for the page, and how many there are: every nth of the run where they are too many.

    Tokens and prompts stand once, in tables; a row has their numbers.
    """
    files = rollout_files.paths(run_dir / rollout_files.FOLDER)
    counts = {step: rollout_files.num_rows(path) for step, path in files.items()}
    total = sum(counts.values())
    every = max(1, math.ceil(total / most_rollouts))
    while (rows := _rows(files, counts, every, most_tokens if every < total else None)) is None:
        every *= 2
    return rows, total


def _rows(
    files: Mapping[int, Path], counts: Mapping[int, int], every: int, most_tokens: int | None
) -> dict[str, Any] | None:
    """Return every nth rollout, None where they have too many tokens."""
    pieces: dict[str, int] = {}
    prompts: dict[tuple[str, str], int] = {}
    rows, num_tokens, before = [], 0, 0
    for step, path in files.items():
        first, before = -before % every, before + counts[step]
        for rollout in rollout_files.read_step(path, first, every) if first < counts[step] else ():
            texts = aligned(rollout.text, rollout.pieces)
            num_tokens += len(texts)
            if most_tokens is not None and num_tokens > most_tokens:
                return None
            rows.append(
                {
                    "step": step,
                    "reward": without_nan(rollout.reward),
                    "truncated": rollout.truncated,
                    "sample": rollout.sample,
                    "version": rollout.first_version,
                    "prompt": prompts.setdefault((rollout.prompt, rollout.answer), len(prompts)),
                    "tokens": [pieces.setdefault(text, len(pieces)) for text in texts],
                    "logratio": without_nan(sum(rollout.logratios)),
                    "ratios": _hundredths(rollout),
                }
            )
    return {"every": every, "rows": rows, "prompts": list(prompts), "pieces": list(pieces)}


def _hundredths(rollout: Trained) -> list[int | None]:
    """The tokens' log-ratios in units of 0.01 nats, for their colours alone; None for what is not finite."""
    return [round(100 * ratio) if math.isfinite(ratio) else None for ratio in rollout.logratios]


def aligned(text: str, pieces: Sequence[str]) -> list[str]:
    """Return for each token its part of `text`, in order: together they are the text.

    A token decoded alone may lack its leading space, or be a part of a character: what the text has there goes to it,
    or to the last of several such.
    """
    if not pieces:
        return []
    parts, place, unread = [""] * len(pieces), 0, 0  # tokens before this one whose part is not known
    for number, piece in enumerate(pieces):
        start = text.find(piece, place, place + _LEAST_PART * unread + len(piece) + 1) if piece else -1
        if start < 0:
            unread += 1
            continue
        if unread:
            parts[number - 1], place = text[place:start], start
        parts[number], place, unread = text[place : start + len(piece)], start + len(piece), 0
    parts[-1] += text[place:]
    return parts


def _filled(title: str, data: str) -> str:
    here = Path(__file__)
    style, script = (here.with_suffix(suffix).read_text(encoding="utf-8") for suffix in (".css", ".js"))
    policy = f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; base-uri 'none'"
    parts = {
        "policy": policy + "; form-action 'none'",
        "title": html.escape(title),
        "style": style,
        "script": script,
        "data": re.sub("[<>&\u2028\u2029]", lambda match: f"\\u{ord(match[0]):04x}", data),  # no tag can begin in it
    }
    template = _TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)
