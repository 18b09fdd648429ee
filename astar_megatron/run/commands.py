"""`astar` commands in processes of their own, each with its configuration and its log in the folder of its run."""

import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from astar_megatron.cluster.processes import python
from astar_megatron.config import RunConfig, as_json
from astar_megatron.data.files import make_folder, tail, write_atomic
from astar_megatron.run.tracking import Screen

LOG_FILE = "log.txt"
_TAIL_BYTES = 8192
_SECONDS_A_LINE = 60.0  # of waiting, where there is no terminal
_PROGRAM = """
import signal
from astar_megatron import cli
from astar_megatron.cluster.processes import die_with
die_with(int(sys.argv[1]), signal.SIGTERM)
sys.argv = ["astar", *sys.argv[2:]]
cli.main()
"""

# Runs `astar NAME --config FILE`, appends all that it says to a log, and returns its exit status.
type Runner = Callable[[str, Path, Path], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandEnd:
    """How a command ended."""

    status: int
    log: Path

    @property
    def error(self) -> str:
        """The last line of what it said, and the status."""
        return f"{last_line(self.log) or 'it said nothing'} (exit status {self.status}, log {self.log})"


def last_line(log: Path) -> str:
    """Return the last line of a log that is not blank; "" without one."""
    return next((line.strip() for line in _newest_first(log) if line.strip()), "")


def last_heading(log: Path) -> str:
    """Return the last line of a log that is no row of a table, which are indented; "" without one."""
    return next((line for line in _newest_first(log) if line.strip() and not line[0].isspace()), "")


def _newest_first(log: Path) -> list[str]:
    if not log.exists():
        return []
    return tail(log, _TAIL_BYTES).decode(errors="replace").splitlines()[::-1]


def write_configuration(cfg: RunConfig) -> tuple[Path, Path]:
    """Write the configuration of a command to its run's folder; return its file and that of the command's log."""
    folder = Path(cfg.run_dir)
    make_folder(folder)
    file = folder / "run.json"  # JSON is YAML
    tree = cfg.model_dump() | {"slurm": {"backend": "local"}}  # the command itself submits nothing
    write_atomic(file, as_json(tree).encode())
    return file, folder / LOG_FILE


def run_command(name: str, cfg: RunConfig, runner: Runner) -> CommandEnd:
    """Run a command in `cfg.run_dir`, where `run.json` will be the configuration, and wait for its end."""
    file, log = write_configuration(cfg)
    return CommandEnd(status=runner(name, file, log), log=log)


def run_shown(name: str, cfg: RunConfig, label: str, screen: Screen, runner: Runner) -> CommandEnd:
    """Run a command as `run_command` does, and show how long it takes and where it is, by its log."""
    log = Path(cfg.run_dir) / LOG_FILE
    with screen.waiting(f"{label}, log in {log}", lambda: last_heading(log), _SECONDS_A_LINE):
        return run_command(name, cfg, runner)


def start(words: Sequence[str], output: int | IO[bytes], *, own_group: bool = False) -> subprocess.Popen[bytes]:
    """Start `astar WORDS`, all of whose output goes to `output`; it gets SIGTERM when this process has died.

    In a process group of its own it hears of Ctrl-C, and what else is sent to this one's, only by this process.
    """
    command = python(_PROGRAM, str(os.getpid()), *words)
    return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, process_group=0 if own_group else None)


def astar(name: str, config_file: Path, log: Path) -> int:
    """Run it as a user would; a Runner. The process ends with this one."""
    with log.open("ab") as file, start([name, "--config", str(config_file)], file) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            raise
