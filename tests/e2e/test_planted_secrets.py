"""A whole run with the real stack: its secrets stay out of files and outputs, its sockets are on loopback."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import samples
import yaml
from sockets import LOOPBACK, listening, members

SECRETS = {
    "RAY_AUTH_TOKEN": "5ec2e7" * 10 + "abcd",
    "WANDB_API_KEY": "planted-weights-and-biases",
    "HF_TOKEN": "hf_planted-hub",
    "HUGGING_FACE_HUB_TOKEN": "hf_planted-hub-of-old",
    "AWS_SECRET_ACCESS_KEY": "planted-cloud",
    "DATABASE_URL": "postgres://me:planted-password@db/x",
    "HTTPS_PROXY": "http://" + "me:planted-proxy@127.0.0.1:9",
}
# It fails once there is a checkpoint, and says all that it can see.
REWARD = """
import os
from pathlib import Path

def reward(response, answer):
    if Path("fail").exists() and Path("run/checkpoints/step_00000001").exists():
        raise KeyError(Path("/proc/self/environ").read_text(), dict(os.environ))
    return len(response) / 1000
"""
TRAP = "from pathlib import Path\nPath({mark!r}).touch()\nclass Own: ...\n"


def with_secrets(*folders: Path) -> Iterator[str]:
    for path in (path for folder in folders for path in folder.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            yield from (f"{path}: {name}" for name, value in SECRETS.items() if value.encode() in data)


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A short folder, in which the sessions' logs lie."""
    folder = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


def planted_model(source: Path, folder: Path, mark: Path) -> Path:
    """Return a copy of a model folder with code of its own for the tokenizer, which makes `mark` when it runs."""
    shutil.copytree(source, folder)
    (folder / "own.py").write_text(TRAP.format(mark=str(mark)))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": [None, "own.Own"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)  # it starts all of the stack three times
def test_a_run_tells_no_secret_runs_no_code_of_its_model_listens_on_loopback_and_follows_the_umask(
    run_tree: Any, tied_llama: Path, tmp_path: Path, temporary: Path
) -> None:
    """Stage 1, training that a reward ends, and training that goes on to its export."""
    mark = tmp_path / "ran"
    tree = run_tree(planted_model(tied_llama, tmp_path / "model", mark))
    reward = {"name": "own_reward:reward", "timeout_seconds": 120.0, "max_failures": 0}
    tree |= {"reward": reward, "checkpoint": {"interval": 1}}
    (tmp_path / "own_reward.py").write_text(REWARD)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))

    listened: set[str] = set()

    def astar(name: str, number: int, status: int) -> None:
        command = [sys.executable, "-m", "astar_megatron.cli", name, "--config", "run.yaml"]
        with (tmp_path / f"output_{number}").open("wb") as output:
            environment = os.environ | SECRETS | {"TMPDIR": str(temporary)}
            streams: Any = {"stdout": output, "stderr": subprocess.STDOUT}
            with subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True, **streams) as run:
                while run.poll() is None:
                    listened.update(listening(members(run.pid)))
                    time.sleep(0.5)
        assert run.returncode == status, (tmp_path / f"output_{number}").read_text()

    with samples.umask_of(0o077):
        astar("sweep", 0, status=0)
        (tmp_path / "fail").touch()
        astar("train", 1, status=2)
        (tmp_path / "fail").unlink()
        astar("train", 2, status=0)
        assert samples.unlike_the_umask(tmp_path / "run") == []

    assert listened and listened <= LOOPBACK
    run = tmp_path / "run"
    reason = samples.read_jsonl(run / "reward_failures.jsonl")[-1]["reason"]
    assert f"PATH={os.environ['PATH']}"[:100] in reason
    assert reason in (tmp_path / "output_1").read_text()
    wanted = [run / "hf/conversion.json", *run.glob("checkpoints/*/progress.json"), *run.glob("v_star/**/*.parquet")]
    logs = [path for path in temporary.glob("astar-*/r/session_*/logs/**/*") if path.is_file()]
    assert len(wanted) >= 3 and all(path.stat().st_size for path in wanted)
    assert any("raylet" in path.name for path in logs) and any("worker" in path.name for path in logs)

    (run / "planted").write_text(f"x{SECRETS['HF_TOKEN']}x")
    assert list(with_secrets(tmp_path, temporary)) == [f"{run / 'planted'}: HF_TOKEN"]
    assert not mark.exists()
