"""`astar train --supervise`: what is started again, what is not, and what is left for whoever looks into it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import samples

from astar_megatron.cluster.signals import LOST, RESUME
from astar_megatron.config import RunConfig
from astar_megatron.run import bundle
from astar_megatron.run.tracking import Screen
from astar_megatron.supervise import ChildEnd, supervise

KILLED = -signal.SIGKILL


def runs(cfg: RunConfig, *ends: tuple[int, int]) -> Callable[[], ChildEnd]:
    """A fake of a child: each call ends with the next status and has done so many steps by then."""
    waiting: Iterator[tuple[int, int]] = iter(ends)

    def run() -> ChildEnd:
        status, steps = next(waiting)
        folder = Path(cfg.run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        samples.write_jsonl(folder / "metrics.jsonl", [{"step": step} for step in range(steps)])
        return ChildEnd(status=status)

    return run


def supervised(
    folder: Path, *ends: tuple[int, int], limit: int = 5, hours: Sequence[float] = (), stopped: bool = False
) -> tuple[int, str]:
    """The last status, and why it was not run again; `hours` are what the clock says, one a look at it."""
    cfg = samples.run_config(run_dir=str(folder), supervise={"max_restarts_per_hour": limit})
    clock = iter(hours)
    now = (lambda: 3600.0 * next(clock)) if hours else (lambda: 0.0)
    end, reason = supervise(cfg, runs(cfg, *ends), lambda: stopped, Screen(), now)
    return end.status, reason


@pytest.mark.parametrize("status", [KILLED, -signal.SIGSEGV, LOST, RESUME])
def test_what_chance_has_ended_is_started_again(status: int, tmp_path: Path) -> None:
    assert supervised(tmp_path, (status, 3), (status, 5), (0, 9)) == (0, "")


def test_a_driver_that_ray_itself_ended_is_started_again(tmp_path: Path) -> None:
    cfg = samples.run_config(run_dir=str(tmp_path))
    ends = iter([ChildEnd(status=1, output="E 5] Failed to connect to GCS within 60 seconds."), ChildEnd(status=0)])
    assert supervise(cfg, lambda: next(ends), lambda: False, Screen()) == (ChildEnd(status=0), "")


@pytest.mark.parametrize("status", [2, 130])
def test_what_the_user_has_to_mend_or_has_ended_is_not(status: int, tmp_path: Path) -> None:
    assert supervised(tmp_path, (KILLED, 3), (status, 3)) == (status, "")


def test_what_ends_a_run_that_had_begun_leaves_a_bundle(tmp_path: Path) -> None:
    """Too many steps that were not finite, a full disk: refused, but not before anything started."""
    cfg = samples.run_config(run_dir=str(tmp_path))

    def run() -> ChildEnd:
        (tmp_path / "placement.json").write_text("{}")
        return ChildEnd(status=2)

    end, reason = supervise(cfg, run, lambda: False, Screen())
    assert (end.status, reason) == (2, "a restart does not mend that")
    assert supervise(cfg, lambda: ChildEnd(status=2), lambda: False, Screen()) == (ChildEnd(status=2), "")


def test_an_error_of_the_program_is_not_but_leaves_a_bundle(tmp_path: Path) -> None:
    assert supervised(tmp_path, (1, 3)) == (1, "a restart does not mend that")


def test_a_restart_that_brings_no_step_is_the_last(tmp_path: Path) -> None:
    status, reason = supervised(tmp_path, (KILLED, 3), (KILLED, 4), (KILLED, 2), (0, 9))
    assert (status, reason) == (KILLED, "the last restart brought no step beyond 4")


def test_a_run_that_dies_before_its_first_step_is_started_again_once(tmp_path: Path) -> None:
    assert supervised(tmp_path / "a", (KILLED, 0), (0, 9)) == (0, "")
    assert supervised(tmp_path / "b", (KILLED, 0), (KILLED, 0), (0, 9))[0] == KILLED


def test_restarts_are_counted_within_an_hour(tmp_path: Path) -> None:
    dying = [(KILLED, steps) for steps in range(1, 5)]
    status, reason = supervised(tmp_path, *dying, (0, 9), limit=2)
    assert (status, reason) == (KILLED, "2 restarts within an hour (supervise.max_restarts_per_hour)")
    hours = [0, 0.5, 1.1, 1.6]
    assert supervised(tmp_path / "slower", *dying, (0, 9), limit=2, hours=hours) == (0, "")


def test_nothing_is_started_again_once_a_signal_has_come(tmp_path: Path) -> None:
    assert supervised(tmp_path, (RESUME, 3), stopped=True) == (RESUME, "")


# --- the child, here one that waits for a pipe that nobody writes to


PARENT = """
import os, sys
from astar_megatron.cluster.signals import PassedOn
from astar_megatron.supervise import run_child
signals = PassedOn()
end = run_child(["plan", "--config", sys.argv[1]], signals)
print("ended", end.status, bool(signals.asked), len(end.output), flush=True)
"""


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A program that waits for the end of `astar plan --config PIPE`, which reads a pipe that says nothing."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    # nohup and a shell's `&` ignore Ctrl-C, and so would what they start
    command = ["env", "--default-signal=INT", sys.executable, "-c", PARENT, str(pipe)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        descriptor = None
        while descriptor is None:
            assert process.poll() is None
            with suppress(OSError):  # nobody reads yet
                descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(1.0)  # Python heeds no signal that comes between its opening the pipe and its waiting for it
        yield process
        process.kill()
        os.close(descriptor)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_passed_on_and_heard_once(number: signal.Signals, parent: subprocess.Popen[str]) -> None:
    os.killpg(parent.pid, number)  # as `timeout` sends it: the child is in a group of its own
    out, _ = parent.communicate(timeout=60)
    assert out.splitlines()[-1].split()[:3] == ["ended", str(RESUME), "True"]
    assert f"ended by {number.name}" in out  # what the child says is shown


def test_ctrl_c_is_passed_on(parent: subprocess.Popen[str]) -> None:
    os.killpg(parent.pid, signal.SIGINT)
    out, _ = parent.communicate(timeout=60)
    assert out.splitlines()[-1].split()[:3] == ["ended", "130", "True"]


def test_a_child_ends_with_a_supervisor_that_is_killed(parent: subprocess.Popen[str]) -> None:
    child = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().strip()
    parent.kill()
    until = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()


# --- the bundle


def test_a_bundle_holds_what_there_is_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = samples.run_config(run_dir=str(tmp_path / "run"), model={"path": "/models/planted-secret-1"})
    folder = tmp_path / "run"
    (folder / "bad_batches" / "step_00000007").mkdir(parents=True)
    (folder / "bad_batches" / "step_00000007" / "batch.json").write_text("{}")
    samples.write_jsonl(folder / "metrics.jsonl", [{"step": step} for step in range(50)])
    logs = tmp_path / "tmp" / "astar-12345678" / "r" / "session_1" / "logs"
    logs.mkdir(parents=True)
    logs.parents[2].chmod(0o700)
    (logs.parents[2] / "lock").write_text("4711")
    (tmp_path / "private").write_text("not of the run")
    (logs / "linked.out").symlink_to(tmp_path / "private")
    (logs / "worker-1.err").write_text("x" * 300_000 + "RuntimeError: planted-secret-1")
    (logs / "stacks.txt").write_text("process 1, by faulthandler: at the end of worker-1.err")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setenv("HF_TOKEN", "planted-secret-1")
    monkeypatch.setenv("MY_KEY", "short")
    program = """
import json, sys
from astar_megatron import config
from astar_megatron.run import bundle
cfg = config.RunConfig.model_validate_json(sys.argv[1])
print(bundle.leave(cfg, "astar train", "step 49\\nplanted-secret-1 short", 4711))
"""
    written = Path(samples.output_of(program, cfg.model_dump_json()).strip())
    assert written.parent == folder and written.name.startswith("bundle_")
    files = {path.relative_to(written).as_posix(): path for path in written.rglob("*") if path.is_file()}
    assert set(files) == {
        *("why.txt", "output.txt", "config.json", "versions.json", "metrics.jsonl", "bad_batch/batch.json"),
        *("logs/worker-1.err", "logs/stacks.txt"),
    }
    texts = {name: path.read_text() for name, path in files.items()}
    assert not [name for name, words in texts.items() if "planted-secret-1" in words]
    assert json.loads(texts["config.json"])["model"]["path"] == "/models/<HF_TOKEN>"
    assert texts["output.txt"] == "step 49\n<HF_TOKEN> short"
    assert texts["logs/worker-1.err"].endswith("RuntimeError: <HF_TOKEN>") and len(texts["logs/worker-1.err"]) < 270_000
    assert [line["step"] for line in samples.read_jsonl(files["metrics.jsonl"])] == list(range(30, 50))
    assert texts["why.txt"].endswith("Stacks: logs/stacks.txt, by faulthandler.\n")
    assert json.loads(texts["versions.json"])["python"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("abcdefghij abcdefgh", "<B_TOKEN> <A_TOKEN>"),  # the longer one whole
        ("/usr/local/bin", "/usr/local/bin"),
        (r'{"token": "quo\"te\\d"}', '{"token": "<QUOTED_KEY>"}'),
        ("secret1 ghp_12345 basic dXNlcg==", "<DB_PASS> <GITHUB_PAT> <X_AUTH>"),
        ("socks5://me:proxy-password@host:1 proxy-password", "socks5://<login>@host:1 <HTTPS_PROXY>"),
        ("postgres://me:never-in-the-environment@db/x", "postgres://<login>@db/x"),
        ("postgres://me:p/ss-never@db/x?a=b", "postgres://<login>@db/x?a=b"),
        ("git+ssh://only-token@host only-token", "git+ssh://<login>@host <INDEX_URL>"),
        ("mysql://db/x?user=me&password=never&sslkey=a.key", "mysql://db/x?user=me&password=<secret>&sslkey=a.key"),
        ("me:never@host:6379 eyJhbGciOi my-db-pwd", "<login>@host:6379 <SLURM_JWT> <MYSQL_PWD>"),
        ("in-the-query p/ss-in-env", "<DATABASE_URL> <TRACKING_URI>"),
        ("before-another-at", "<MIRROR>"),
        ("hf://datasets/x@main/y docker:24@sha256:ab", "hf://datasets/x@main/y docker:24@sha256:ab"),
    ],
)
def test_secrets_are_taken_out_in_whatever_form_they_stand(text: str, expected: str) -> None:
    environment = {
        "A_TOKEN": "abcdefgh",
        "B_TOKEN": "abcdefghij",
        "PATH": "/usr/local/bin",
        "QUOTED_KEY": 'quo"te\\d',
        "DB_PASS": "secret1",
        "GITHUB_PAT": "ghp_12345",
        "X_AUTH": "basic dXNlcg==",
        "HTTPS_PROXY": "socks5://me:proxy-password@host:1",
        "INDEX_URL": "git+ssh://only-token@host/simple",
        "SLURM_JWT": "eyJhbGciOi",
        "MYSQL_PWD": "my-db-pwd",
        "PWD": "/usr/local/bin",
        "DATABASE_URL": "mysql://db/x?user=me&password=in-the-query",
        "TRACKING_URI": "postgresql://me:p/ss-in-env@db/x",
        "MIRROR": "ftp://me:before-another-at@host/a@b",
    }
    assert bundle.without_secrets(text, environment) == expected


def test_a_secret_at_the_edge_of_what_is_kept_is_not_kept_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "planted-secret-1")
    output = "planted-secret-1" + "x" * ((256 << 10) - 8)
    folder = bundle.leave(samples.run_config(run_dir=str(tmp_path)), "why", output, 4711)
    kept = (folder / "output.txt").read_text()
    assert len(kept) == 256 << 10 and not {"secret", "cret-1"} & set(kept.split("x"))


def test_the_rest_of_a_secret_that_was_cut_is_not_kept_where_characters_have_several_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "planted-secret-1")
    read = (256 << 10) + (8 << 10)
    cut = "anted-secret-1" + "答" * (read // 3)  # as the last bytes of a log may begin
    folder = bundle.leave(samples.run_config(run_dir=str(tmp_path)), "why", cut, 4711)
    kept = (folder / "output.txt").read_text()
    assert set(kept) == {"答"} and len(kept.encode()) > 255 << 10
