"""The newest steps of a run as a table that stays at the bottom of a terminal, with what the run is at now."""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

_STEPS = 5  # shown
_NUMBERS = ("reward_mean", "loss", "slope", "r_squared", "flat_groups", "logratio_mean", "kl_token")  # that there are
_SECONDS = ("generate", "publish", "reference", "policy", "total")
_WORDS = {
    "drain": "waiting for the responses on their way",
    "turns": "policy and engines change places",
    "publish": "weights go to the engines",
    "eval": "evaluation",
    "generate": "waiting for the engines",
    "score": "waiting for the reward",
    "train": "the ranks train",
    "checkpoint": "waiting for the checkpoint",
}


class Board:
    """What is shown of a run of `num_steps`: `add` takes lines of metrics, `now` the name of what the driver does."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._lines: deque[Mapping[str, Any]] = deque(maxlen=_STEPS)
        self._now, self._since = "", time.perf_counter()

    def add(self, line: Mapping[str, Any]) -> None:
        self._lines.append(line)

    def now(self, name: str) -> None:
        """Hear what the driver does from now on; "": nothing that takes long."""
        self._now, self._since = name, time.perf_counter()

    def __rich__(self) -> RenderableType:
        words = Text(f"step {self._step()} of 0..{self._num_steps - 1}", style="bold")
        if self._now:
            seconds = time.perf_counter() - self._since
            words.append(f"  {_WORDS.get(self._now, self._now)}, {seconds:.0f} s", style="not bold")
        return Group(self._table(), words) if self._lines else words

    def _step(self) -> int:
        return min(self._lines[-1]["step"] + 1, self._num_steps - 1) if self._lines else 0

    def _table(self) -> Table:
        lines = tuple(self._lines)
        numbers = [name for name in _NUMBERS if any(name in line for line in lines)]
        table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1, 0, 0))
        for name in ("step", *(name.removesuffix("_mean") for name in numbers), *(f"{name} s" for name in _SECONDS)):
            table.add_column(name, justify="right", overflow="fold")
        for line in lines:
            seconds = line.get("seconds", {})
            cells = [_short(line.get(name), 3) for name in numbers]
            cells += [_short(seconds.get(name), 1) for name in _SECONDS]
            table.add_row(str(line["step"]), *cells)
        return table


@contextmanager
def board_on(console: Console, num_steps: int) -> Iterator[Board]:
    """Yield a board that a terminal shows below what is said meanwhile, and nothing else does."""
    board = Board(num_steps)
    if not console.is_terminal:
        yield board
        return
    with Live(board, console=console, refresh_per_second=2):
        console.show_cursor(True)  # a second signal ends the program at once, and would leave it hidden
        yield board


def _short(value: object, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else ""
