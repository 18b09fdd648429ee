"""What vLLM says while an engine starts: its own log, in a file beside those of Ray's processes.

vLLM is told how to log by a JSON file, and tells every process that it starts. The driver, on the same machine, reads
the last line: loading, compiling, capturing graphs, in vLLM's own words.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_FORMAT = "%(asctime)s\t%(levelname)s\t%(message)s"
_TAIL_BYTES = 1 << 14
_WIDTH = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class StartLog:
    """The log of one engine, and the file that tells vLLM to write it."""

    log: Path
    config: Path

    @classmethod
    def make(cls, folder: Path, name: str) -> Self:
        """Write `name`.json into `folder`, by which vLLM logs to `name`.log there, and errors to stderr too."""
        made = cls(log=folder / f"{name}.log", config=folder / f"{name}.json")
        file = {"class": "logging.FileHandler", "filename": str(made.log), "level": "INFO", "formatter": "line"}
        errors = {"class": "logging.StreamHandler", "level": "ERROR", "formatter": "line"}
        text = {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"line": {"format": _FORMAT}},
            "handlers": {"file": file, "errors": errors},
            "loggers": {"vllm": {"handlers": ["file", "errors"], "level": "INFO", "propagate": False}},
        }
        made.config.write_text(json.dumps(text), encoding="utf-8")
        return made

    def environment(self) -> dict[str, str]:
        """Return what the engine's processes need in their environment."""
        return {"VLLM_LOGGING_CONFIG_PATH": str(self.config)}

    def last_words(self) -> str:
        """Return what vLLM said last, of a long message its beginning; empty before it says anything."""
        if not self.log.is_file():
            return ""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
        for line in reversed(lines):
            time, level, words = (*line.split("\t", 2), "", "")[:3]
            if time and level.isupper() and words:  # else it goes on with a message of several lines
                return words if len(words) <= _WIDTH else f"{words[:_WIDTH]}..."
        return ""
