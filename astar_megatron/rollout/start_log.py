"""What an engine does while it starts, read from vLLM's own log: a file beside those of Ray's processes.

vLLM is told how to log by a JSON file, and tells every process that it starts. On the engine's node one looks for the
messages that begin a phase: loading, measuring memory, compiling, capturing graphs.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_FORMAT = "%(asctime)s\t%(levelname)s\t%(message)s"
# What vLLM 0.32 logs, in part, when a phase begins. It captures graphs, or only warms up, when its cache is made.
PHASES = {
    "Initializing a V1 LLM engine": "starting its worker",
    "Starting to load model": "loading the weights",  # by runner V1, and on a CPU
    "Loading model from scratch": "loading the weights",  # by runner V2
    "Model loading took": "measuring its memory",
    "for vLLM's torch.compile": "compiling the model",
    "Warming up model for the compilation": "compiling the model",
    "Initial profiling/warmup run took": "measuring its memory",
    "KV cache size: ": "{warming up}",
    "Compile and warming up model for size": "compiling the model",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StartLog:
    """The log of one engine, and the file that tells vLLM to write it."""

    log: Path
    config: Path

    @classmethod
    def of(cls, folder: Path, name: str) -> Self:
        """Return the log of an engine that has this name in `folder`."""
        return cls(log=folder / f"{name}.log", config=folder / f"{name}.json")

    @classmethod
    def make(cls, folder: Path, name: str) -> Self:
        """Write `name`.json into `folder`, by which vLLM logs to `name`.log there, and errors to stderr too."""
        made = cls.of(folder, name)
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

    def phase(self, *, has_graphs: bool) -> str:
        """Return in words what the engine does now; `has_graphs`: it captures graphs before it is ready."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.is_file() else ""
        begun = {text.rfind(message): phase for message, phase in PHASES.items()}
        begun[-1] = "starting its process"  # of the messages that are not there
        phase = begun[max(begun)]
        return phase.format(**{"warming up": "capturing graphs" if has_graphs else "warming up"})
