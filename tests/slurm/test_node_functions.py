"""What single functions of slurm/train.sbatch do on a node whose /proc, names or network are not as usual."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

TRAIN = Path(__file__).parents[2] / "slurm" / "train.sbatch"
FUNCTIONS = TRAIN.read_text().removesuffix('main "$@"\n')
# A step of another job by the same user, whose slurmstepd is root's; then that slurmstepd is killed.
TWO_STEPS = """
mount -t tmpfs -o mode=1777 tmpfs /tmp && mount -t proc -o hidepid={hidepid} proc /proc || exit 3
ln -s "$(command -v bash)" /tmp/slurmstepd
as_user() {{ setpriv --reuid 1234 --regid 1234 --clear-groups bash -c "$@"; }}
export -f as_user
/tmp/slurmstepd -c 'as_user "mkdir /tmp/step; exec 9>>/tmp/step/node; flock 9; touch /tmp/step/begun; sleep 100"; :' &
until [ -e /tmp/step/begun ]; do sleep 0.1; done
as_user "$FUNCTIONS"'is_abandoned /tmp/step; echo $?'
kill -KILL $!
until as_user "$FUNCTIONS"'is_abandoned /tmp/step'; do sleep 0.1; done
echo abandoned
"""


@pytest.mark.parametrize("hidepid", [0, 1, 2])
def test_a_step_whose_slurmstepd_is_hidden_is_alive_until_that_has_ended(hidepid: int) -> None:
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-c", TWO_STEPS.format(hidepid=hidepid)]
    environment = os.environ | {"FUNCTIONS": FUNCTIONS}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    if (done.returncode == 1 and "unshare failed" in done.stderr) or done.returncode == 3:
        pytest.skip(f"this machine allows no namespaces: {done.stderr.strip()}")
    assert done.stdout == "1\nabandoned\n", done.stderr


def test_who_holds_a_nodes_folder_is_found_where_tmp_is_a_link(call: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    printed = call(f"exec 9>>folder/node; echo $$; holders_of {tmp_path}/link/folder").split()
    assert len(printed) > 1 and printed[0] in printed[1:]


@pytest.mark.parametrize("owner", ["a link's", "another user's"])
def test_of_a_folder_that_is_anothers_nothing_is_read(call: Callable[..., str], tmp_path: Path, owner: str) -> None:
    """A pipe would be read for ever."""
    (tmp_path / "others").mkdir()
    os.mkfifo(tmp_path / "others" / "step")
    if owner == "a link's":
        (tmp_path / "temp.0").symlink_to("others")
    elif os.geteuid() == 0:
        (tmp_path / "others").rename(tmp_path / "temp.0")
        os.chown(tmp_path / "temp.0", 1234, 1234)
    else:
        pytest.skip("only root can make a folder another user's")
    assert "temp.0 is no folder of yours" in call("SLURM_JOB_ID=7 ASTAR_TEMP=./temp; refuse_beside")


@pytest.fixture
def call(tmp_path: Path) -> Callable[..., str]:
    """Return a function that runs a line of the script's shell and gives what it prints.

    Its words name programs that stand in for others, each with its text.
    """

    def call(line: str, **programs: str) -> str:
        for name, text in programs.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
            (tmp_path / name).chmod(0o755)
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURMD_NODENAME": "node1"}
        (tmp_path / "functions.sh").write_text(FUNCTIONS)
        command = ["bash", "-c", f". ./functions.sh\n{line}"]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )
        return done.stdout + done.stderr

    return call


NETWORKS = {
    "its name's": ("10.0.0.1", "192.168.0.1", "10.0.0.1"),
    "its name is loopback's": ("127.0.1.1", "169.254.3.4 fe80::1 10.0.0.2 192.168.0.1 ", "10.0.0.2"),
    "it has none": ("127.0.1.1", "169.254.3.4 fe80::1", "ASTAR_INTERFACE=: no IPv4 address here that other nodes"),
    "its name is unknown": ("", "10.0.0.3", "10.0.0.3"),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_a_node_is_reached_by_its_names_address_or_its_first_that_others_reach(
    call: Callable[..., str], network: str
) -> None:
    by_name, own, wanted = NETWORKS[network]
    line = 'own_address && echo "$address" || echo "$no_address"'
    printed = call(line, getent=f"echo '{by_name}      STREAM node1'", hostname=f"echo '{own}'")
    assert printed.startswith(wanted)


UNREACHED = [  # as Slurm says it
    "Unable to contact slurm controller (connect failure)",
    "Socket timed out on send/recv operation",
    "Zero Bytes were transmitted or received",
    "Slurm backup controller in standby mode",
    "Message send failure",
    "Message receive failure",
    "Protocol authentication error",
]
# As at the end of a job.
REQUEUES = """
SLURM_JOB_ID=7 ASTAR_LOGS=. ASTAR_MAX_REQUEUES=3 ASTAR_ATTEMPT=9 begun=1 cancelled='' run_folder=. refusal=''
"""


def test_only_own_requeues_count(call: Callable[..., str]) -> None:
    printed = call(REQUEUES + "for _ in 1 2 3 4; do requeue 75; done; SLURM_JOB_ID=70; requeue 75", scontrol="")
    lines = [line.partition("node1: ")[2] for line in printed.splitlines()]
    assert lines[:3] == ["requeued"] * 3 and lines[4] == "requeued"
    assert lines[3] == "not requeued: it has been 3 times (ASTAR_MAX_REQUEUES); the same sbatch command goes on"


def test_a_run_that_loses_a_process_twice_without_a_step_between_is_not_requeued(call: Callable[..., str]) -> None:
    step = "mkdir -p arm; echo step >>arm/metrics.jsonl"
    again = "sed -i 1d arm/metrics.jsonl; echo longer step >>arm/metrics.jsonl"  # one since the checkpoint

    def ends(line: str) -> list[str]:
        printed = call(f"rm -rf arm requeued; {REQUEUES}{line}", scontrol="")
        return [line.partition("node1: ")[2].partition(":")[0] for line in printed.splitlines()]

    assert ends(f"{step}; requeue 69; {step}; requeue 69") == ["requeued", "requeued"]
    assert ends(f"{step}; requeue 69; {again}; requeue 69") == ["requeued", "not requeued"]
    assert ends(f"{step}; requeue 75; requeue 69; requeue 69") == ["requeued", "requeued", "not requeued"]
    assert ends(f"{step}; ln -sfn arm link; run_folder=link; requeue 69; {step}; requeue 69") == ["requeued"] * 2
    for unseen in ("''", "/only/in/the/container"):
        assert ends(f"run_folder={unseen}; requeue 69; requeue 69") == ["requeued", "requeued"]


def test_what_is_not_requeued_says_why(call: Callable[..., str]) -> None:
    ended = call(f"{REQUEUES}cancelled=1 requeue 75")
    assert "not requeued: Slurm has ended it; where it has requeued it itself (squeue -j 7), there is" in ended
    assert call(f"{REQUEUES}cancelled=1; requeue 0; requeue 1") == ""


@pytest.mark.parametrize("unreached", UNREACHED)
def test_slurm_is_asked_again_until_it_answers(call: Callable[..., str], unreached: str) -> None:
    fails = f"[ -e asked ] || {{ touch asked; echo '{unreached}' >&2; exit 1; }}\necho JobId=7 Restarts=0"
    printed = call("SLURM_JOB_ID=7 cancelled=''; job_record ask_slurm", scontrol=fails, sleep="")
    assert printed.startswith("JobId=7 Restarts=0\n") and printed.endswith(f"node1: {unreached}\n")


def test_what_slurm_refuses_is_not_asked_again_and_not_told_as_requeued(call: Callable[..., str]) -> None:
    refuses = "echo asked >>asked; echo Requested operation is presently disabled >&2; kill -TERM $PPID; exit 1"
    printed = call(f"{REQUEUES}trap 'cancelled=1' TERM; requeue 75; wc -l <asked", scontrol=refuses, sleep="")
    told = [line.partition("node1: ")[2] or line for line in printed.splitlines()]
    assert sorted(told) == [
        "1",
        "Requested operation is presently disabled",
        "it could not be requeued (the message is above); the same sbatch command goes on",
    ]


SECOND_SIGNALS = {  # EndTime of scontrol, 300 s from now as far as it says: seconds until the second signal
    "$(date -d '+300 seconds' +%FT%T)": "270",
    "$(date -d '+40 seconds' +%FT%T)": "20",
    "$(date -d '-1 hours' +%FT%T)": "270",
    "next week": "270",
    "Unknown": "",
}


@pytest.mark.parametrize("end", SECOND_SIGNALS)
def test_the_second_signal_comes_30_s_before_slurms_limit(call: Callable[..., str], end: str) -> None:
    record = f'[ -z "${{SLURM_TIME_FORMAT:-}}" ] && echo "JobId=7 EndTime={end} Deadline=N/A"'
    line = "SLURM_TIME_FORMAT=%s; export SLURM_TIME_FORMAT; . ./functions.sh; SLURM_JOB_ID=7; cancelled=''"
    # `sleep` notes the time left and ends the loop, as the end of the script would
    noted = 'kill() { [ -z "${at:-}" ] || echo $((at - now)) >left; return 1; }'
    call(f"{line}; {noted}; ask_again; true", scontrol=record)
    printed = call("cat left 2>/dev/null")
    assert abs(int(printed or -99) - int(SECOND_SIGNALS[end] or -99)) <= 2


def test_a_node_without_the_interface_is_named(call: Callable[..., str]) -> None:
    variables = "ASTAR_PYTHON=true ASTAR_ADDRESS=x:1 ASTAR_START_SECONDS=9 SLURM_NODEID=1 ASTAR_INTERFACE=ib9"
    assert "node1: ASTAR_INTERFACE=ib9: no IPv4 address here that other" in call(f"{variables}; join_ray", ip="")
    without = "command() { return 1; }; ip() { return 127; }; ASTAR_INTERFACE=ib9; own_address || echo $no_address"
    assert call(without).startswith("ASTAR_INTERFACE: the command ip is not here")


def test_a_step_that_is_ended_says_nothing_although_ray_has_the_signal_first(call: Callable[..., str]) -> None:
    variables = "SLURM_NODEID=0 ASTAR_PYTHON=true ASTAR_ADDRESS=x:1 ASTAR_START_SECONDS=9 log=log temp=."
    line = f"{variables} in_folder=./ends; own_address() {{ address=; }}; trap 'echo ended; exit 0' TERM; join_ray"
    assert call(line, ends="{ sleep 0.3; kill -TERM $PPID; } &\nexit 143") == "ended\n"


def test_an_array_asks_again_where_its_script_lies(call: Callable[..., str], tmp_path: Path) -> None:
    fails = f"[ -e asked ] || {{ touch asked; exit 1; }}\necho '   Command={tmp_path}/sweep.sbatch c.yaml'"
    (tmp_path / "train.sbatch").write_text("echo $ASTAR_PROGRAM")
    (tmp_path / "spool").mkdir()
    shutil.copy(TRAIN.with_name("sweep.sbatch"), tmp_path / "spool" / "slurm_script")
    line = "SLURM_JOB_ID=7 bash spool/slurm_script c.yaml"
    assert call(line, scontrol=fails, sleep="").endswith("sweep\n")


def test_a_job_whose_program_had_begun_the_time_before_is_requeued_whatever_the_folder_of_logs_is_called(
    call: Callable[..., str],
) -> None:
    folder = "mkdir 'a [1-4]*'; : >'a [1-4]*/driver-node1-8.log'"
    printed = call(f"{REQUEUES}{folder}; ASTAR_LOGS='a [1-4]*' begun=''; requeue 75", scontrol="")
    assert printed.endswith("node1: requeued\n")


@pytest.mark.parametrize("script", ["train.sbatch", "sweep.sbatch"])
def test_options_of_the_shell_that_the_environment_has_do_not_count(script: str, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/bash\necho $-\nls no*such\n[ no = yes ]\necho ended | grep -v x\n")
    python.chmod(0o755)
    (tmp_path / "run.yaml").touch()
    environment = {
        "PATH": os.environ["PATH"],
        "ASTAR_PYTHON": str(python),
        "SHELLOPTS": "errexit:nounset:pipefail:xtrace:verbose:noclobber",
        "BASHOPTS": "nullglob:failglob:nocasematch",
    }
    command = ["bash", str(TRAIN.with_name(script)), "run.yaml"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.endswith("ended\n")
    assert not set(done.stdout.splitlines()[0]) & set("euxvC")
    assert "exec" not in done.stderr  # of what the script traces, the lines before it takes that back


@pytest.mark.parametrize("end", ["", "; exit 3"])
def test_names_that_a_setup_sets_are_not_those_that_the_job_removes(call: Callable[..., str], end: str) -> None:
    names = "ASTAR_TEMP=$PWD/t ASTAR_LOGS=$PWD/logs SLURM_NODEID=0 ASTAR_ATTEMPT=0 ASTAR_PYTHON=python3 child=''"
    setup = f"ASTAR_SETUP='temp=$PWD/mine log=$PWD/mine.log{end}'"
    steps = "mkdir mine t.0; name_folder; (set_up 1 leave_node; echo is-${temp##*/} is-${log##*/}); ls"
    printed = call(f"{names}; {setup}; {steps}").split()
    assert "mine" in printed and "t.0" not in printed
    assert ({"is-t.0", "is-ray-node1-0.log"} <= {*printed}) == (not end)


@pytest.mark.parametrize("line", ["export HF_TOKEN=secret; false", "exit 3 # secret"])
def test_of_a_setup_that_fails_nothing_but_the_status_is_said(call: Callable[..., str], line: str) -> None:
    printed = call(f"export ASTAR_SETUP='{line}'; (set_up 1 :); echo $?")
    assert "ASTAR_SETUP ended with status" in printed and "secret" not in printed


@pytest.mark.parametrize(("image", "default"), [("", "/.venv/bin/python"), ("a/b:1", "python3")])
def test_a_container_has_its_own_python(call: Callable[..., str], image: str, default: str) -> None:
    """The one of the folder of submission would look for the libraries of the host."""
    venv = "touch run.yaml; mkdir -p .venv/bin; echo 'echo $0' >.venv/bin/python; chmod +x .venv/bin/python"
    printed = call(f"{venv}; ASTAR_IMAGE={image}; (trap 'echo $ASTAR_PYTHON' EXIT; main run.yaml 2>/dev/null)")
    assert printed.endswith(f"{default}\n")


def test_a_node_that_is_not_the_first_of_the_job_is_refused(call: Callable[..., str]) -> None:
    job = "export SLURM_JOB_ID=7 SLURM_JOB_NODELIST=node[0-1] SLURM_JOB_NUM_NODES=2 ASTAR_PYTHON=bash"
    printed = call(f"{job}; touch run.yaml; main run.yaml; echo", scontrol="echo node0; echo node1")
    message = "this is node1, but Ray's head and the program run on the job's first node, node0; begin there"
    assert f"node1: {message}" in printed
