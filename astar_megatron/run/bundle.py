"""What is kept of a run that ended badly, for whoever looks into it: one folder, <run_dir>/bundle_<time>/.

    why.txt         the command, how it ended, why it was not started again, and how the stacks were taken
    output.txt      the end of what the driver printed
    logs/           the end of each output of Ray, ranks and engines, and stacks.txt (cluster/session_stacks.py)
    config.json, versions.json, metrics.jsonl (the last lines)
    bad_batch/      the newest batch whose loss or gradient was not finite, if there is one

What variables of the environment hold that are secrets by their names, and logins in addresses, are taken out of all
but bad_batch/.
"""

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from astar_megatron.cluster import session
from astar_megatron.cluster.session_stacks import STACKS_FILE
from astar_megatron.config import RunConfig
from astar_megatron.config_secrets import SECRET_NAME, has_login, secrets_of, without_logins
from astar_megatron.data.files import make_folder, storage_error, tail
from astar_megatron.data.run_folder import BAD_BATCHES
from astar_megatron.run import machine
from astar_megatron.run.tracking import METRICS_FILE

_TAIL_BYTES = 256 << 10  # of a text
_METRICS_LINES = 20
_SHORTEST_SECRET = 6  # characters: a shorter value stands in words that are none
_LONGEST_SECRET = 8 << 10  # bytes: what is read beyond the tail, so that none is cut in two


def leave(cfg: RunConfig, why: str, output: str, driver: int) -> Path:
    """Write the bundle of a run whose driver, the process of that number, has ended; return its folder.

    Raises StorageError.
    """
    run_dir = Path(cfg.run_dir)
    folder = run_dir / time.strftime("bundle_%Y-%m-%d_%H-%M-%S")
    incomplete = folder.with_name(f"{folder.name}.incomplete")
    logs = session.log_folder(driver)
    texts = {
        "why.txt": f"{why}\nStacks: {_ways(logs)}.\n",
        "output.txt": output,
        "config.json": json.dumps(settings_without_secrets(cfg), indent=1) + "\n",
        "versions.json": json.dumps(machine.versions(), indent=1) + "\n",
        METRICS_FILE: "".join(_tail(run_dir / METRICS_FILE).splitlines(keepends=True)[-_METRICS_LINES:]),
    }
    texts |= {f"logs/{path.name}": _tail(path) for path in (logs.iterdir() if logs else ()) if _is_file(path)}
    batches = sorted((run_dir / BAD_BATCHES).glob("step_*"), key=lambda path: path.stat().st_mtime)
    try:
        make_folder(incomplete / "logs")
        for name, text in texts.items():
            if text:
                (incomplete / name).write_text(_end(text), encoding="utf-8")
        if batches:
            shutil.copytree(batches[-1], incomplete / "bad_batch")
        incomplete.rename(folder)
    except OSError as error:
        raise storage_error(f"{folder}: can't write the bundle", error) from error
    return folder


def settings_without_secrets(cfg: RunConfig) -> dict[str, Any]:
    """Return a configuration as a tree of plain values, without secrets of the environment and the section slurm."""
    return values_without_secrets(cfg.model_dump(exclude={"slurm"}))


def values_without_secrets(values: dict[str, Any]) -> dict[str, Any]:
    """Return plain values as JSON has them, without secrets of the environment."""
    return _cleaned(json.loads(json.dumps(values)))


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        text = _without_variables(value, os.environ)
        return without_logins(text) if has_login(text) else text  # else it may be a prompt's, word for word
    if isinstance(value, list):
        return [_cleaned(each) for each in value]
    return {name: _cleaned(each) for name, each in value.items()} if isinstance(value, dict) else value


def without_secrets(text: str, environment: Mapping[str, str]) -> str:
    """Return a text with the name of its variable in place of each secret of the environment, and without logins."""
    return without_logins(_without_variables(text, environment))


def _without_variables(text: str, environment: Mapping[str, str]) -> str:
    secrets = {}
    for name, value in environment.items():
        if SECRET_NAME.search(name):
            secrets[value] = name
        secrets |= dict.fromkeys(secrets_of(value), name)
    secrets = {value: name for value, name in secrets.items() if len(value) >= _SHORTEST_SECRET}
    secrets |= {json.dumps(value)[1:-1]: name for value, name in secrets.items()}  # as it stands in JSON
    for value in sorted(secrets, key=len, reverse=True):  # one may be part of another
        text = text.replace(value, f"<{secrets[value]}>")
    return text


def _ways(logs: Path | None) -> str:
    if logs is None:
        return "none: no process of the run's cluster was left, nor its logs"
    text = _tail(logs / STACKS_FILE)
    ways = [way for way in ("py-spy", "faulthandler") if f"by {way}" in text]
    return f"logs/{STACKS_FILE}, by {' and '.join(ways)}" if ways else "none: no worker was left to be asked"


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _end(text: str) -> str:
    """The end of a text, without secrets; of a long one neither what may be the rest of one that was cut in two."""
    end = without_secrets(text, os.environ)
    if len(text.encode(errors="replace")) >= _TAIL_BYTES + _LONGEST_SECRET:
        end = end.encode(errors="replace")[_LONGEST_SECRET:].decode(errors="ignore")
    return end[-_TAIL_BYTES:]


def _tail(path: Path) -> str:
    try:
        return tail(path, _TAIL_BYTES + _LONGEST_SECRET).decode(errors="replace")
    except OSError:  # it is not there
        return ""
