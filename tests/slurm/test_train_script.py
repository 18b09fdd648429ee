"""What slurm/train.sbatch and sweep.sbatch do with a job, on a real Slurm; stand_in.py stands in for Ray and astar."""

import fcntl
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from two_node_slurm import SECONDS, Slurm, two_node_slurm

from astar_megatron.config_slurm import VARIABLES

SCRIPTS = Path(__file__).parents[2] / "slurm"
TRAIN, SWEEP = SCRIPTS / "train.sbatch", SCRIPTS / "sweep.sbatch"
STAND_IN = {"ASTAR_PYTHON": str(Path(__file__).with_name("stand_in.py"))}
SAVES_ON_SIGNAL = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
Path("begun").touch()
signal.pause()
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with two_node_slurm(tmp_path_factory.mktemp("slurm")) as slurm:
        yield slurm


@pytest.fixture
def submit(slurm: Slurm, tmp_path: Path) -> Callable[..., str]:
    """Return a function that submits a program, as the configuration that the stand-in runs, and gives the job."""

    def submit(
        program: str, *flags: str, env: Mapping[str, str] | None = None, script: Path = TRAIN, words: str = ""
    ) -> str:
        (tmp_path / "program.py").write_text(program)
        environment = STAND_IN | dict(env or {})
        return slurm.submit(*(flags or ["-N2"]), script, "program.py", *words.split(), cwd=tmp_path, env=environment)

    return submit


def output(folder: Path, job: str) -> str:
    file = folder / f"{job}.out"
    return file.read_text() if file.exists() else ""


def wait_for(file: Path) -> None:
    until = time.monotonic() + SECONDS
    while not file.exists():
        assert time.monotonic() < until, f"no {file}"
        time.sleep(0.1)


def wait_for_words(folder: Path, job: str, words: str) -> str:
    """Return what a job has printed, when these words are among it."""
    until = time.monotonic() + SECONDS
    while words not in (printed := output(folder, job)):
        assert time.monotonic() < until, printed
        time.sleep(0.1)
    return printed


def test_the_program_runs_when_all_nodes_have_joined_and_its_status_is_the_jobs(
    slurm: Slurm, submit: Callable[..., str], tmp_path: Path
) -> None:
    job = submit("print(sorted(JOINED), WORDS)\nraise SystemExit(3)", words="--set seed=1")
    assert slurm.wait(job) == "FAILED"
    assert slurm.fact(job, "ExitCode") == "3:0"
    logs = tmp_path / "logs" / f"slurm-{job}"
    assert "['node1', 'node2'] ['train', '--config', 'program.py', '--set', 'cluster.address=10.99.0.11:" in (
        (logs / "driver-node1-0.log").read_text()
    )
    assert "'--set', 'seed=1'] " in output(tmp_path, job).replace("]\n", "] ")  # the end of a failed program's output
    names = {file.name for file in logs.iterdir()}
    assert {"ray-node1-0.log", "ray-node2-0.log", "preflight-node1-0.log", "driver-node1-0.log"} <= names
    assert [(logs / f"ray-{node}-0" / "raylet.out").read_text() for node in ("node1", "node2")] == [
        "of node1\n",
        "of node2\n",
    ]
    assert slurm.left_behind(job) == []


def test_usr1_lets_the_program_save_and_requeues_the_job_until_the_cap(
    slurm: Slurm, submit: Callable[..., str], tmp_path: Path
) -> None:
    job = submit(SAVES_ON_SIGNAL, env={"ASTAR_MAX_REQUEUES": "1"})
    for attempt in (0, 1):
        wait_for(tmp_path / "begun")
        (tmp_path / "begun").unlink()
        assert slurm.fact(job, "Restarts") == str(attempt)
        slurm.run("scancel", "--signal=USR1", "--batch", job)
        if attempt == 0:
            wait_for(tmp_path / "logs" / f"slurm-{job}" / "driver-node1-1.log")
    assert slurm.wait(job) == "FAILED"
    assert slurm.fact(job, "ExitCode") == "75:0"
    assert "requeued\n" in output(tmp_path, job)
    assert "not requeued: it has been 1 times (ASTAR_MAX_REQUEUES)" in output(tmp_path, job)
    assert slurm.left_behind(job) == []


def test_a_node_that_does_not_join_is_named_and_ends_the_job(
    slurm: Slurm, submit: Callable[..., str], tmp_path: Path
) -> None:
    job = submit("", env={"ABSENT": "node2", "ASTAR_START_SECONDS": "4"})
    assert slurm.wait(job) == "FAILED"
    assert "node2 is bad\n" in output(tmp_path, job)
    assert "preflight stops the job; see " in output(tmp_path, job)
    assert not (tmp_path / "logs" / f"slurm-{job}" / "driver-node1-0.log").exists()
    assert slurm.left_behind(job) == []


def test_a_bad_node_is_left_out_where_there_is_a_spare(
    slurm: Slurm, submit: Callable[..., str], tmp_path: Path
) -> None:
    """Also where a file for every bash has set noclobber: with it that node could not be ended."""
    (tmp_path / "env.sh").write_text("set -C\n")
    env = {"BASH_ENV": str(tmp_path / "env.sh"), "BAD": "node2", "ASTAR_SPARE_NODES": "1"}
    job = submit("print(JOINED)", env=env)
    assert slurm.wait(job) == "COMPLETED", output(tmp_path, job)
    assert (tmp_path / "logs" / f"slurm-{job}" / "driver-node1-0.log").read_text() == "{'node1'}\n"
    assert slurm.left_behind(job) == []


def test_two_jobs_on_the_same_nodes_do_not_meet(slurm: Slurm, submit: Callable[..., str], tmp_path: Path) -> None:
    program = """
import time
from pathlib import Path
me = WORDS[-1]
Path(me).touch()
while not (Path("seed=1").exists() and Path("seed=2").exists()):
    time.sleep(0.1)
print(sorted(JOINED))
"""
    port = {"ASTAR_PORT": "23000"}  # asked for by both: the second to come takes the next
    jobs = [submit(program, env=port, words=f"--set seed={n}") for n in (1, 2)]
    for job in jobs:
        assert slurm.wait(job) == "COMPLETED"
        assert (tmp_path / "logs" / f"slurm-{job}" / "driver-node1-0.log").read_text() == "['node1', 'node2']\n"
        assert slurm.left_behind(job) == []


def test_a_port_is_another_jobs_before_anything_listens_there(
    slurm: Slurm, submit: Callable[..., str], tmp_path: Path
) -> None:
    with Path("/tmp/astar-port-23100").open("a") as taken:
        fcntl.flock(taken, fcntl.LOCK_EX)
        job = submit("print(WORDS)", env={"ASTAR_PORT": "23100"})
        assert slurm.wait(job) == "COMPLETED"
    assert "=10.99.0.11:23102'" in (tmp_path / "logs" / f"slurm-{job}" / "driver-node1-0.log").read_text()


def test_nothing_is_left_of_a_cancelled_job(slurm: Slurm, submit: Callable[..., str], tmp_path: Path) -> None:
    job = submit(SAVES_ON_SIGNAL)
    wait_for(tmp_path / "begun")
    assert any("sleep 100000" in line for line in slurm.processes())  # what would stay
    slurm.run("scancel", job)
    assert slurm.wait(job) == "CANCELLED"
    assert slurm.left_behind(job) == []


@pytest.mark.slow
def test_what_outlived_its_steps_is_ended_by_the_next_job(
    slurm: Slurm, submit: Callable[..., str], tmp_path: Path
) -> None:
    """Only that: a job that runs beside it keeps its own."""
    beside = submit(SAVES_ON_SIGNAL, "-N2", "--job-name=beside")
    wait_for(tmp_path / "begun")
    (tmp_path / "begun").unlink()
    lost = submit(SAVES_ON_SIGNAL, env={"ASTAR_MAX_REQUEUES": "0"})
    wait_for(tmp_path / "begun")
    slurm.run("pkill", "-KILL", "-f", rf"slurmstepd: \[{lost}\.")
    folders = sorted(Path("/tmp").glob(f"astar-{lost}-*"))
    assert len(folders) == 2
    slurm.run("scancel", lost)
    assert slurm.wait(submit("")) == "COMPLETED"
    left = slurm.run("sh", "-c", "cat /proc/[0-9]*/environ 2>/dev/null | tr '\\0' '\\n' | grep ^RAY_AUTH_TOKEN_PATH")
    assert not any(folder.exists() for folder in folders) and f"astar-{lost}-" not in left
    assert f"astar-{beside}-" in left and len(list(Path("/tmp").glob(f"astar-{beside}-*"))) == 2
    slurm.run("scancel", beside)
    slurm.wait(beside)
    assert slurm.left_behind(beside) == []


def test_a_node_whose_ray_was_killed_is_named(slurm: Slurm, submit: Callable[..., str], tmp_path: Path) -> None:
    program = "import signal\nfrom pathlib import Path\nPath('begun').touch()\nsignal.signal(10, lambda *_: exit(69))"
    job = submit(program + "\nsignal.pause()", env={"ASTAR_MAX_REQUEUES": "0"})
    wait_for(tmp_path / "begun")
    pid = slurm.run("pgrep", "-f", "stand_in.py -m ray.*--node-name=node2").split()[-1]
    slurm.run("kill", "-KILL", pid)
    wait_for_words(tmp_path, job, "node2: Ray ended here with status 137; see ")
    slurm.run("scancel", f"--signal={signal.SIGUSR1.name[3:]}", "--batch", job)
    assert slurm.wait(job) == "FAILED"
    assert slurm.fact(job, "ExitCode") == "69:0"
    assert slurm.left_behind(job) == []


@pytest.mark.slow
def test_other_nodes_are_cleared_when_the_first_has_lost_ray_and_its_folder(
    slurm: Slurm, submit: Callable[..., str], tmp_path: Path
) -> None:
    job = submit("", env={"ABSENT": "node2", "ASTAR_START_SECONDS": "600"})  # there it is tried again and again
    logs = tmp_path / "logs" / f"slurm-{job}"
    wait_for(logs / "preflight-node1-0.log")
    wait_for(logs / "ray-node2-0.log")
    slurm.run("pkill", "-KILL", "-f", "stand_in.py -m ray.*--node-name=node1")
    assert slurm.wait(job) == "FAILED"
    assert "preflight stops the job" in output(tmp_path, job)
    assert "Ray did not end in 30 s" not in output(tmp_path, job)
    assert slurm.left_behind(job) == []


def test_usr1_to_all_steps_lets_the_program_save_with_ray_still_there(
    slurm: Slurm, submit: Callable[..., str], tmp_path: Path
) -> None:
    """As scancel sends it without --batch, or Slurm by a --signal without B:."""
    program = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGUSR1, lambda *_: None)
Path("begun").touch()
signal.pause()
time.sleep(3)
print("saved with", sorted(names(WORDS[-1].partition("=")[2])))
raise SystemExit(75)
"""
    job = submit(f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\nfrom stand_in import names\n{program}")
    wait_for(tmp_path / "begun")
    slurm.run("scancel", "--signal=USR1", job)
    wait_for_words(tmp_path, job, "requeued\n")
    log = tmp_path / "logs" / f"slurm-{job}" / "driver-node1-0.log"
    assert log.read_text() == "saved with ['node1', 'node2']\n"
    slurm.run("scancel", job)
    slurm.wait(job)
    assert slurm.left_behind(job) == []


@pytest.mark.parametrize("victim", ["Ray", pytest.param("the program", marks=pytest.mark.slow)])
def test_a_job_whose_first_node_loses_ray_or_the_program_is_requeued(
    slurm: Slurm, submit: Callable[..., str], tmp_path: Path, victim: str
) -> None:
    """The program has longer to end than what Ray has left on that node."""
    program = """
import os, time
from pathlib import Path
Path("begun").touch()
if os.environ.get("SLURM_RESTART_COUNT"):
    raise SystemExit
while JOINED:
    time.sleep(0.5)
    JOINED = names(WORDS[-1].partition("=")[2])
time.sleep(6)
raise SystemExit(69)
"""
    program = f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\nfrom stand_in import names\n{program}"
    job = submit(program)
    wait_for(tmp_path / "begun")
    pattern = {"Ray": "stand_in.py -m ray.*--node-name=node1", "the program": "stand_in.py -m astar.* train "}[victim]
    pid = slurm.run("pgrep", "-f", pattern).split()[-1]
    slurm.run("kill", "-KILL", pid)
    assert " ended with status 69; its output: " in wait_for_words(tmp_path, job, "requeued\n")
    slurm.run("scancel", job)
    slurm.wait(job)
    assert slurm.left_behind(job) == []


def test_an_array_runs_the_sweep_in_each_of_its_tasks_and_requeues_each_alone(
    slurm: Slurm, submit: Callable[..., str], tmp_path: Path
) -> None:
    """The last task has the number of the whole array."""
    program = """
import os
if os.environ["SLURM_ARRAY_TASK_ID"] == "3" and "SLURM_RESTART_COUNT" not in os.environ:
    raise SystemExit(75)
print(WORDS[0], sorted(JOINED))
"""
    job = submit(program, "-N1", "--array=0-3", script=SWEEP, words="--set run_dir=runs/sweep.sbatch")
    assert slurm.wait(job) == "COMPLETED"
    logs = sorted((tmp_path / "logs" / f"slurm-{job}").glob("task-*/driver-*.log"))
    attempts = [(log.parent.name, log.stem[-1]) for log in logs]
    assert attempts == [("task-0", "0"), ("task-1", "0"), ("task-2", "0"), ("task-3", "0"), ("task-3", "1")]
    assert {log.read_text() for log in logs} <= {"sweep ['node1']\n", "sweep ['node2']\n", ""}


INHERITED = {
    "SLURM_TIMELIMIT": "1",
    "SLURM_STDINMODE": "none",
    "SLURM_STDOUTMODE": "none",
    "SLURM_CONSTRAINT": "none",
    "SLURM_EXCLUSIVE": "1",
    "SLURM_NO_KILL": "1",
    "SLURM_OVERCOMMIT": "1",
    "SLURM_RELATIVE": "1",
    "SLURM_NTASKS_PER_CORE": "1",
    "SLURM_GPU_BIND": "none",
    "SLURM_GRES": "none",
    "SLURM_HET_SIZE": "2",
    "SCANCEL_STATE": "PENDING",
    "SLURM_ARRAY_JOB_ID": "7",
    "SLURM_ARRAY_TASK_ID": "3",
    "SLURM_RESTART_COUNT": "3",
    "SLURM_GPUS": "1",
    "SLURM_GPUS_PER_NODE": "1",
    "SLURM_GPUS_PER_TASK": "1",
    "SLURM_MEM_PER_CPU": "100",
    "SLURM_MEM_PER_NODE": "200",
    "SLURM_MEM_PER_GPU": "300",
    "SLURM_CPUS_PER_GPU": "4",
    "SLURM_CPUS_PER_TASK": "99",
    "SLURM_NTASKS_PER_GPU": "1",
    "SLURM_TRES_PER_TASK": "cpu:99",
    "SLURM_HINT": "nomultithread",
    "SLURM_THREADS_PER_CORE": "1",
    "SLURM_DISTRIBUTION": "plane",
    "SRUN_CPUS_PER_TASK": "2",
    "SLURM_WORKING_DIR": "/",
    "SLURM_REMOTE_CWD": "/",
    "CDPATH": ".",
    "SECONDS": "500",
    "RAY_AUTH_TOKEN": "of-all-jobs",
    "RAY_ADDRESS": "10.99.0.1:6379",
    "ASTAR_SETUP": "cd /",  # not inherited, and moves nothing either
}


def test_what_the_job_that_submits_hands_on_changes_nothing(
    slurm: Slurm, submit: Callable[..., str], tmp_path: Path
) -> None:
    program = "import os\nprint(os.getcwd(), 'SLURM_ARRAY_TASK_ID' in os.environ, flush=True)\n"
    program += f"os.system('{shutil.which('squeue')} --steps --noheader --format=%l --job=$SLURM_JOB_ID')"
    job = submit(program, "-N2", "--mem=500", env=INHERITED)
    assert slurm.wait(job) == "COMPLETED", output(tmp_path, job)
    log = tmp_path / "logs" / f"slurm-{job}" / "driver-node1-0.log"
    first, *limits = log.read_text().splitlines()
    assert first == f"{tmp_path} False" and {*limits} == {"UNLIMITED"}
    assert slurm.left_behind(job) == []


def test_what_a_setup_sets_of_the_shell_does_not_stay(slurm: Slurm, submit: Callable[..., str], tmp_path: Path) -> None:
    line = "set -euf -o pipefail; shopt -s failglob; IFS=:"
    job = submit("print(JOINED)", "-N1", env={"ASTAR_SETUP": line})
    assert slurm.wait(job) == "COMPLETED"
    logs = tmp_path / "logs" / f"slurm-{job}"
    assert (logs / "driver-node1-0.log").read_text() == "{'node1'}\n"
    assert (logs / "ray-node1-0" / "raylet.out").exists()
    assert slurm.left_behind(job) == []


@pytest.mark.parametrize(("line", "status"), [("cd /no/such", 1), ("set -e; exit 3", 3)])
def test_a_setup_that_fails_is_named_and_ends_the_job(
    slurm: Slurm, submit: Callable[..., str], tmp_path: Path, line: str, status: int
) -> None:
    job = submit("", env={"ASTAR_SETUP": line})
    assert slurm.wait(job) == "FAILED"
    assert f"node1: ASTAR_SETUP ended with status {status}\n" in output(tmp_path, job)
    assert slurm.left_behind(job) == []


@pytest.mark.slow
def test_a_start_that_takes_too_long_names_the_variable_and_begins_with_srun(
    slurm: Slurm, submit: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", "sleep 6"), ("scontrol", 'sleep 4; exec /usr/bin/scontrol "$@"')):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    job = submit("", env={"PATH": path, "ASTAR_START_SECONDS": "3"})
    assert slurm.wait(job) == "FAILED"
    assert "srun did not start Ray on node1 node2 in 3 s (ASTAR_START_SECONDS); give it more" in output(tmp_path, job)


def test_an_allocation_is_used_by_srun_and_refused_beside_its_nodes(slurm: Slurm, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("print(sorted(JOINED))")
    command = f"bash {TRAIN} program.py 2>beside; srun -N1 -n1 bash {TRAIN} program.py"
    slurm.run("salloc", "-N2", "bash", "-c", command, cwd=tmp_path, env=STAND_IN)
    assert re.search(r"of job \d+, but on none of its nodes; submit the script", (tmp_path / "beside").read_text())
    (log,) = tmp_path.glob("logs/slurm-*/driver-*-0.log")
    assert log.read_text() == "['node1', 'node2']\n"


def test_a_run_after_another_in_an_allocation_keeps_its_output_and_renews_rays(slurm: Slurm, tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / f"{name}.py").write_text(f"print('{name}')")
    run = f"srun -N1 -n1 bash {TRAIN}"
    slurm.run("salloc", "-N2", "bash", "-c", f"{run} first.py; {run} second.py", cwd=tmp_path, env=STAND_IN)
    (logs,) = tmp_path.glob("logs/slurm-*")
    kept = [(logs / f"driver-node1-0.log{end}").read_text() for end in (".old", "")]
    assert kept == ["first\n", "second\n"]
    assert [file.name for file in (logs / "ray-node2-0").iterdir()] == ["raylet.out"]


def test_a_second_run_in_an_allocation_is_refused_and_the_first_goes_on(slurm: Slurm, tmp_path: Path) -> None:
    program = "import time\nfrom pathlib import Path\nPath('begun').touch()\n"
    (tmp_path / "program.py").write_text(
        f"{program}while not Path('end').exists(): time.sleep(0.1)\nprint(sorted(JOINED))"
    )
    run = f"srun --overlap -N1 -n1 bash {TRAIN} program.py"
    command = f"{run} & until [ -e begun ]; do sleep 0.1; done; {run} 2>beside; echo $? >status; touch end; wait $!"
    slurm.run("salloc", "-N2", "bash", "-c", command, cwd=tmp_path, env=STAND_IN)
    assert (tmp_path / "status").read_text() == "2\n"
    words = r"another run of job \d+ is on this node, step 1; wait for its end, or take another allocation\n"
    assert re.search(words, (tmp_path / "beside").read_text())
    (log,) = tmp_path.glob("logs/slurm-*/driver-*-0.log")
    assert log.read_text() == "['node1', 'node2']\n"


# Slurm itself ends what has its time limit in 8 s.
SCONTROL = """#!/bin/sh
if [ "$1" != --oneliner ]; then exec REAL "$@"; fi
REAL "$@" | sed "s/ EndTime=[^ ]*/ EndTime=$(date -d '+8 seconds' +%FT%T)/"
"""


def test_a_step_that_outlasts_the_notice_is_ended_in_time_for_the_job_to_be_requeued(
    slurm: Slurm, submit: Callable[..., str], tmp_path: Path
) -> None:
    program = """
import signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75)))
open("begun", "w").close()
time.sleep(600)
"""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text(SCONTROL.replace("REAL", shutil.which("scontrol") or ""))
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    job = submit(program, env={"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"})
    wait_for(tmp_path / "begun")
    slurm.run("scancel", "--signal=USR1", "--batch", job)
    printed = wait_for_words(tmp_path, job, "requeued\n")
    assert printed.index("SIGUSR1: the program is asked to save") < printed.index("SIGUSR1 again: the program is asked")
    slurm.run("scancel", job)
    slurm.wait(job)
    assert slurm.left_behind(job) == []


def test_the_jobs_network_is_that_of_the_interface_that_is_named(
    slurm: Slurm, submit: Callable[..., str], tmp_path: Path
) -> None:
    job = submit("print(WORDS)", "-N1", env={"ASTAR_INTERFACE": "lo"})
    assert slurm.wait(job) == "COMPLETED"
    log = tmp_path / "logs" / f"slurm-{job}" / "driver-node1-0.log"
    assert "'cluster.address=127.0.0.1:" in log.read_text()


SRUN = """#!/bin/sh
if [ "$1" = --help ]; then echo --container-image; exit; fi
for word in "$@"; do
    shift
    case $word in
    --container-*) echo "$word" >>flags ;;
    *) set -- "$@" "$word" ;;
    esac
done
exec REAL "$@"
"""


def test_every_step_is_told_image_and_mounts(slurm: Slurm, submit: Callable[..., str], tmp_path: Path) -> None:
    """With an srun that has pyxis's flags; containers themselves are not there. A path with : can't be mounted."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text(SRUN.replace("REAL", shutil.which("srun") or ""))
    (tmp_path / "bin" / "srun").chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    job = submit("", env={"PATH": path, "ASTAR_IMAGE": "registry/image:1", "ASTAR_MOUNTS": "/models:/models"})
    assert slurm.wait(job) == "COMPLETED"
    logs = tmp_path / "logs" / f"slurm-{job}"
    mounts = f"/tmp:/tmp,{tmp_path}:{tmp_path},{logs}:{logs},/models:/models"
    flags = Counter((tmp_path / "flags").read_text().splitlines())
    wanted = ["image=registry/image:1", f"workdir={tmp_path}", f"mounts={mounts}"]
    assert flags == {f"--container-{flag}": 3 for flag in wanted}  # Ray, preflight, the program
    job = submit("", env={"PATH": path, "ASTAR_IMAGE": "registry/image:1", "ASTAR_LOGS": "a,b:c"})
    assert slurm.wait(job) == "FAILED"
    assert f"{tmp_path}/a,b:c are mounted, but a path with , or : can't be" in output(tmp_path, job)


def test_a_step_that_srun_does_not_start_is_said_in_its_log(
    slurm: Slurm, submit: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    real = shutil.which("srun")
    text = f'#!/bin/sh\ncase $* in *" --ntasks=1 --nodelist="*) echo no step >&2; exit 1 ;; esac\nexec {real} "$@"\n'
    (tmp_path / "bin" / "srun").write_text(text)
    (tmp_path / "bin" / "srun").chmod(0o755)
    job = submit("", env={"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"})
    assert slurm.wait(job) == "FAILED"
    assert "no step\nsrun could not start it; its message is in the job's output\n" in output(tmp_path, job)


def test_head_script_and_guide_name_the_same_variables() -> None:
    text, guide = TRAIN.read_text(), (SCRIPTS / "README.md").read_text()
    head = set(re.findall(r"^#     (ASTAR_\w+) ", text, re.MULTILINE))
    own = {"ASTAR_ADDRESS", "ASTAR_ATTEMPT", "ASTAR_TEMP"}  # which the script sets for its steps
    assert head == set(re.findall(r"^\| `(ASTAR_\w+)` \|", guide, re.MULTILINE))
    assert head == set(re.findall(r"ASTAR_[A-Z_]*[A-Z]", text)) - own
    assert head == set(VARIABLES)  # which slurm.env takes, or names the key for


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shellcheck_has_nothing_to_say() -> None:
    done = subprocess.run(["shellcheck", TRAIN, SWEEP], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


BAD_INPUT = {
    "no configuration": ("missing.yaml", {}, "the first word after train.sbatch is a YAML file, got 'missing.yaml'"),
    "more spares than nodes": (
        "program.py",
        {"ASTAR_SPARE_NODES": "2"},
        "ASTAR_SPARE_NODES=2 of 2 nodes leave none for the run; ask for more",
    ),
    "no command": (
        "program.py",
        {"ASTAR_PROGRAM": "bogus"},
        "ASTAR_PROGRAM=bogus: expected train, sweep, eval, compare or export",
    ),
    "no Python": ("program.py", {"ASTAR_PYTHON": "/no/python"}, "ASTAR_PYTHON=/no/python: no such program here"),
    "no port": ("program.py", {"ASTAR_PORT": "65535"}, "expected the first of 64 ports, from 1024 to 65472"),
    "no number": ("program.py", {"ASTAR_PORT": "x"}, "ASTAR_PORT=x: expected a whole number"),
    "no switch": ("program.py", {"ASTAR_PREFLIGHT": "no"}, "ASTAR_PREFLIGHT=no: expected 0 or 1"),
    "octal": ("program.py", {"ASTAR_PORT": "08192"}, "ASTAR_PORT=08192: expected a whole number"),
    "logs that can't be written": ("program.py", {"ASTAR_LOGS": "program.py"}, "ASTAR_LOGS=program.py: can't write"),
    "no interface": ("program.py", {"ASTAR_INTERFACE": "no0"}, "ASTAR_INTERFACE=no0: no IPv4 address here that other"),
    "no pyxis": ("program.py", {"ASTAR_IMAGE": "image.sqsh"}, "ASTAR_IMAGE: this Slurm has no pyxis; leave it out"),
}


def test_bad_input_is_refused_before_ray_is_started(slurm: Slurm, tmp_path: Path) -> None:
    (tmp_path / "program.py").touch()
    jobs = {
        name: slurm.submit("-N2", TRAIN, config, cwd=tmp_path, env=STAND_IN | env)
        for name, (config, env, _) in BAD_INPUT.items()
    }
    for name, job in jobs.items():
        assert slurm.wait(job) == "FAILED", name
        assert slurm.fact(job, "ExitCode") == "2:0", name
        assert BAD_INPUT[name][2] in output(tmp_path, job), name
    for name, job in jobs.items():
        assert slurm.left_behind(job) == [], name


@pytest.mark.slow
def test_a_dead_slurmd_is_named_by_srun_and_ends_the_job(tmp_path: Path) -> None:
    with two_node_slurm(tmp_path) as slurm:
        (tmp_path / "program.py").touch()
        script = f"kill -KILL $(pgrep -f 'slurmd -N node2'); exec bash {TRAIN} program.py"
        env = STAND_IN | {"ASTAR_START_SECONDS": "60"}
        job = slurm.submit("-N2", "--ntasks-per-node=1", "--wrap", script, cwd=tmp_path, env=env)
        # Slurm itself calls the job ended when it gives that node up.
        printed = wait_for_words(tmp_path, job, "srun could not start Ray on node1 node2")
        assert " failed on node node2: " in printed
        assert slurm.left_behind(job) == []


def test_a_signal_before_the_program_has_begun_requeues_the_job(
    slurm: Slurm, submit: Callable[..., str], tmp_path: Path
) -> None:
    """The first attempt waits for a node that never joins; the second runs."""
    env = {"ABSENT": "node2", "ASTAR_START_SECONDS": "600", "ASTAR_SPARE_NODES": "1"}
    job = submit("", env=env)
    logs = tmp_path / "logs" / f"slurm-{job}"
    wait_for(logs / "preflight-node1-0.log")
    slurm.run("scancel", "--signal=USR1", "--batch", job)
    wait_for(logs / "preflight-node1-1.log")
    assert "requeued\n" in output(tmp_path, job)
    assert not (logs / "driver-node1-0.log").exists()
    slurm.run("scancel", job)
    slurm.wait(job)
    assert slurm.left_behind(job) == []


@pytest.mark.parametrize(
    ("where", "name"),
    [("setup", "TERM"), ("preflight", "TERM"), ("driver", "TERM"), ("preflight", "USR1"), ("driver", "USR1")],
)
def test_a_job_that_slurm_asks_to_end_before_its_program_heeds_that_is_requeued(
    slurm: Slurm, submit: Callable[..., str], tmp_path: Path, where: str, name: str
) -> None:
    """By a signal to all steps and not to the script, as a preempted job with GraceTime gets SIGTERM."""
    env = {
        "setup": {"ASTAR_SETUP": "touch begun; sleep 600 & wait"},
        "preflight": {"ABSENT": "node2", "ASTAR_START_SECONDS": "600"},
        "driver": {},
    }
    job = submit("import time\nopen('begun', 'w').close()\ntime.sleep(600)", env=env[where])
    logs = tmp_path / "logs" / f"slurm-{job}"
    wait_for(tmp_path / "begun" if where != "preflight" else logs / "ray-node2-0.log")
    if where == "setup":
        wait_for(logs / "preflight-node1-0.log")
    elif where == "preflight":
        wait_for(Path(f"/tmp/astar-{job}-0.0/preflight"))
    slurm.run("scancel", f"--signal={name}", job)
    printed = wait_for_words(tmp_path, job, "requeued\n")
    assert "ended with status 1" not in printed and "Invalid job id" not in printed
    assert slurm.fact(job, "Restarts") == "1"
    slurm.run("scancel", job)
    slurm.wait(job)
    assert slurm.left_behind(job) == []


def test_a_heterogeneous_job_is_refused(slurm: Slurm, submit: Callable[..., str], tmp_path: Path) -> None:
    job = submit("", "-N1", ":", "-N1")
    assert slurm.wait(job) == "FAILED"
    assert f"job {job} is heterogeneous, and a run takes nodes of one kind; submit" in output(tmp_path, job)


@pytest.mark.slow
def test_a_job_that_is_always_asked_to_end_before_its_program_begins_is_not_requeued_for_ever(
    slurm: Slurm, submit: Callable[..., str], tmp_path: Path
) -> None:
    job = submit("", env={"ABSENT": "node2", "ASTAR_START_SECONDS": "600", "ASTAR_SPARE_NODES": "1"})
    for attempt in (0, 1):
        wait_for(tmp_path / "logs" / f"slurm-{job}" / f"preflight-node1-{attempt}.log")
        slurm.run("scancel", "--signal=USR1", "--batch", job)
    assert slurm.wait(job) == "FAILED"
    assert "not requeued: this time and the time before it was asked to end before the program" in output(tmp_path, job)
    assert slurm.left_behind(job) == []


def test_outside_a_job_containers_and_a_setup_that_fails_are_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").touch()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    for name, value, status, message in (
        ("ASTAR_IMAGE", "a/b:1", 2, "ASTAR_IMAGE=a/b:1: only jobs have containers; leave it out"),
        ("ASTAR_SETUP", "exit 3", 3, "ASTAR_SETUP ended with status 3"),
        ("ASTAR_SETUP", "false", 1, "ASTAR_SETUP ended with status 1"),
        ("ASTAR_SETUP", "exit 0", 1, "ASTAR_SETUP ended with status 0"),
    ):
        own = environment | {"ASTAR_PYTHON": "/bin/true", name: value}
        command = ["bash", TRAIN, "c.yaml"]
        done = subprocess.run(command, cwd=tmp_path, env=own, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout) == (status, "") and done.stderr.endswith(f" astar: {message}\n")


@pytest.mark.parametrize(("script", "program"), [(TRAIN, "eval"), (SWEEP, "sweep")])
def test_outside_a_job_the_program_runs_here(tmp_path: Path, script: Path, program: str) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"; exit 5\n')
    python.chmod(0o755)
    (tmp_path / "c.yaml").touch()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(
        ["bash", script, "c.yaml", "--set", "seed=1"],
        cwd=tmp_path,
        env=environment | {"ASTAR_PYTHON": str(python), "ASTAR_PROGRAM": "eval"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (
        5,
        f"-m astar_megatron.cli {program} --config c.yaml --set seed=1 --set slurm.backend=local\n",
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml", "python"]
