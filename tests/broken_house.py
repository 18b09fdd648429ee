"""A folder with all that a run needs, ways to break it, and what a command starts: for tests/test_bad_input.py."""

import contextlib
import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import ray
import samples
import yaml
from torch.nn.modules.module import register_module_parameter_registration_hook

from astar_megatron import config
from astar_megatron.data.contract import contract_of
from astar_megatron.data.manifest import write_manifest
from astar_megatron.data.prompts import PromptStream, read_prompts
from astar_megatron.data.v_star import VStarTable
from conversion import rewrite
from conversion.ends import open_end
from conversion.tiles import ParallelLayout

ROWS = [{"question": "What is 1 + 1?", "answer": "2"}, {"question": "What is 1 + 2?", "answer": "3"}]
DEEP = b"[" * 100_000


@dataclass(frozen=True, slots=True)
class House:
    """A folder with all that a run needs: model/, prompts.jsonl, run.yaml; the run itself would lie in run/."""

    folder: Path
    ends: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @classmethod
    def build(cls, folder: Path, model: Path) -> "House":
        folder.mkdir(exist_ok=True)
        shutil.copytree(model, folder / "model")
        samples.write_jsonl(folder / "prompts.jsonl", ROWS)
        tree = samples.run_tree(
            run_dir=str(folder / "run"),
            model={"path": str(folder / "model"), "dtype": "float32"},
            data={"path": str(folder / "prompts.jsonl"), "max_prompt_tokens": 30},
            sampling={"max_response_tokens": 8},
        )
        (folder / "run.yaml").write_text(yaml.safe_dump(tree))
        return cls(folder)

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def digests(self) -> dict[str, str]:
        """Return a word for all that lies in the folder, by its name."""
        paths = (path for path in self.folder.rglob("*") if "__pycache__" not in path.parts)
        return {str(path.relative_to(self.folder)): _digest(path) for path in paths}


def _digest(path: Path) -> str:
    if path.is_symlink():
        return f"link to {path.readlink()}"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"


type Break = Callable[[House], object]

# --- how input is broken; names are of files in the house


def write(name: str, data: bytes | str) -> Break:
    def broken(house: House) -> None:
        (house / name).parent.mkdir(parents=True, exist_ok=True)
        (house / name).write_bytes(data if isinstance(data, bytes) else data.encode())

    return broken


def after(*breaks: Break) -> Break:
    return lambda house: [broken(house) for broken in breaks]


def remove(name: str) -> Break:
    return lambda house: (house / name).unlink(missing_ok=True)


def folder(name: str) -> Break:
    return after(remove(name), lambda house: (house / name).mkdir(parents=True))


def linked_to_itself(name: str) -> Break:
    return after(remove(name), lambda house: (house / name).symlink_to(house / name))


def copied(name: str, to: str) -> Break:
    return lambda house: shutil.copytree(house / name, house / to)


def cut(name: str) -> Break:
    return lambda house: (house / name).write_bytes((house / name).read_bytes()[:-1000])


def changed(name: str, **values: Any) -> Break:
    return lambda house: (house / name).write_text(json.dumps(json.loads((house / name).read_text()) | values))


def appended(name: str, data: bytes) -> Break:
    return lambda house: (house / name).write_bytes((house / name).read_bytes() + data)


def prompts(*rows: Any) -> Break:
    return lambda house: samples.write_jsonl(house / "prompts.jsonl", rows)


def mounted(name: str, options: str) -> Break:
    """A small or read-only disk."""

    def broken(house: House) -> None:
        (house / name).mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", house / name], capture_output=True)
        if done.returncode:
            pytest.skip(f"this user can't mount a disk: {done.stderr.decode().strip()}")
        house.ends.callback(subprocess.run, ["umount", house / name], check=True)

    return broken


def table(**contract: Any) -> Break:
    """A whole V* table, of the run's contract but for the fields that are named."""

    def broken(house: House) -> None:
        cfg = config.load(house / "run.yaml")
        run_prompts = read_prompts(cfg.data, cfg.model.path)
        stored = VStarTable.create_or_open(cfg.table_dir, replace(contract_of(cfg), **contract))
        numbers = range(cfg.sweep.num_samples)
        stored.append([samples.rollout(prompt, sample=number) for prompt in run_prompts for number in numbers])

    return broken


def checkpoint(**progress: Any) -> Break:
    """A table, metrics, and what the driver reads of a checkpoint after 7 steps, with the fields that are named."""

    def broken(house: House) -> None:
        cfg = config.load(house / "run.yaml")
        order = PromptStream(read_prompts(cfg.data, cfg.model.path), cfg.train.batch_size, cfg.seed)
        fields = {"step": 7, "prompts": order.state(), "in_flight": 0, "dtype": "float32", "earlier": []}
        fields |= {"contract": contract_of(cfg).fields(), "settings": config.flat(cfg)}
        write(PROGRESS, json.dumps(fields | progress))(house)
        write_manifest((house / PROGRESS).parent, {})
        write(LATEST, "step_00000007")(house)
        write("run/metrics.jsonl", steps(7))(house)

    return after(table(), broken)


def steps(number: int) -> str:
    return "".join(f'{{"step": {step}}}\n' for step in range(number))


PROGRESS, LATEST = "run/checkpoints/step_00000007/progress.json", "run/checkpoints/latest"


def locked(name: str) -> Break:
    def broken(house: House) -> None:
        (house / name).parent.mkdir()
        file = house.ends.enter_context((house / name).open("a"))
        fcntl.flock(file, fcntl.LOCK_EX)

    return broken


def header(**fields: Any) -> Break:
    """The header of the safetensors file says something else of one tensor."""

    def broken(house: House) -> None:
        path, name = house / "model/model.safetensors", "model.norm.weight"
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        stored = json.loads(data[8:start])
        stored[name] |= fields
        text = json.dumps(stored).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])

    return broken


def megatron(house: House) -> None:
    rewrite.write_megatron(open_end(house / "model"), house / "megatron", ParallelLayout())


STAGE_1 = {
    "prompt": [{"role": "user", "content": "x"}],
    "reward_model": {"ground_truth": "2"},
    "response_0": "2",
    "eval_0": 1.0,
}


def stage_1(**fields: Any) -> Break:
    return write("stage_1.jsonl", json.dumps(STAGE_1 | fields))


def comparison(text: str | bytes) -> Break:
    return write("out/compare.json", text)


# --- what is heard of while a command runs

_STARTS = ("subprocess.Popen", "os.posix_spawn", "os.fork", "os.exec", "os.system")
_heard: list[str] | None = None


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if _heard is not None and event in _STARTS and "reward_process" not in str(arguments):
        _heard.append(f"{event} {arguments[:2]}")


sys.addaudithook(_hear)  # there is no way to take it off again


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """Yield the list of what is started meanwhile: processes but those of rewards, models of torch, engines, Ray."""
    global _heard
    _heard, before = (started := list[str]()), set(sys.modules)
    hook = register_module_parameter_registration_hook(lambda module, *_: started.append(type(module).__name__))
    try:
        yield started
    finally:
        _heard = None
        hook.remove()
        started += sorted({"vllm", "megatron.core"} & (set(sys.modules) - before))
        started += ["Ray"] if ray.is_initialized() else []
