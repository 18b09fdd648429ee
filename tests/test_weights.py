"""Publishing: the transfer folder, and that a publish which went wrong stops the run, by name."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import torch
from exports import write_export
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from astar_megatron.cluster.errors import ClusterError
from astar_megatron.cluster.session import remove_shared_folders
from astar_megatron.config import ConversionConfig
from astar_megatron.run.weights import LoadedWeights, TransferFolder, WeightSync
from conversion import hf
from conversion.families import Model, read_model
from conversion.folders import ModelFolderError
from conversion.plan import WeightMismatch, WeightPlan, plan
from conversion.tiles import ParallelLayout
from conversion.transfer import TransferError
from conversion.transfer.route import Place, Route, here
from conversion.verify import Holdings, held_parts, sent_parts

# Two that hold a folder, the first of them the process itself; for one import, which takes seconds.
HOLD = """
import os
from astar_megatron.run.weights import TransferFolder
os.fork()
with TransferFolder() as folder:
    os.write(1, f"{os.getpid()} {folder.path}\\n".encode())  # at once, not between the other's words
    input()
"""


def test_what_a_killed_run_left_is_removed_and_what_a_living_one_holds_is_not() -> None:
    killed = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert killed.stdout
        folders = dict(killed.stdout.readline().split() for _ in range(2))
        of_killed, of_living = Path(folders.pop(str(killed.pid))), Path(*folders.values())
        killed.kill()
        killed.wait()
        assert of_killed.is_dir() and of_living.is_dir()
        with TransferFolder() as folder:
            assert [path.is_dir() for path in (of_killed, of_living, folder.path)] == [False, True, True]
        assert not folder.path.exists()
    finally:
        killed.communicate("\n")  # until the living one has ended
    assert not of_living.exists()


def test_a_folder_just_made_is_not_taken_for_a_killed_runs() -> None:
    ours = TransferFolder()
    try:
        with TransferFolder():  # another run starts before ours is locked
            assert ours.path.is_dir()
        with ours, TransferFolder():  # and another after that
            assert ours.path.is_dir()
        assert not ours.path.exists()
        dead = TransferFolder()  # killed before it was locked
        os.utime(dead.path, (0, 0))
        remove_shared_folders()
        assert not dead.path.exists()
    finally:
        shutil.rmtree(ours.path, ignore_errors=True)


class Policy:
    """Two trainer ranks in this process, behind the face of a PolicyGroup; `hosts` are where they say they are."""

    layout = ParallelLayout(tensor=2)
    dtype = "float32"

    def __init__(self, model: Model, folder: Path, hosts: tuple[str, str] | None = None) -> None:
        self.model, self.threads, self.hosts = model, ThreadPoolExecutor(2), hosts
        self.senders: list[Any] = []
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.rendezvous = ("127.0.0.1", self.store.port)
        self.tensors = [empty(model.megatron_shapes(self.layout, rank)) for rank in range(2)]
        for rank, tensors in enumerate(self.tensors):
            hf.load(folder, plan(model.hf_tiles(), model.megatron_tiles(self.layout)), rank, tensors)

    def places(self) -> list[Place]:
        return [Place(memory=host) for host in self.hosts] if self.hosts else [here(torch.device("cpu"))] * 2

    def open_publish(self, route: Route) -> None:
        way = plan(self.model.megatron_tiles(self.layout), self.model.vllm_tiles(route.num_workers))
        for sender in self.senders:
            sender.close()
        self.senders = [route.sender(way, rank, t, torch.float32) for rank, t in enumerate(self.tensors)]
        self.holdings = [Holdings(sent_parts(way, r), t, torch.float32) for r, t in enumerate(self.tensors)]

    def begin_publish(self, version: int, senders: list[int]) -> list[Future[None]]:
        return [self.threads.submit(self.senders[rank].send, version) for rank in senders]

    def digests(self, senders: list[int]) -> dict[int, list[int]]:
        return {rank: self.holdings[rank].digests() for rank in senders}

    def digest_rows(self, rank: int, index: int) -> list[int]:
        return self.holdings[rank].rows(index)


class Member:
    """An engine of one worker."""

    def __init__(self, index: int, model: Model) -> None:
        self.index, self.tensors, self.serves = index, empty(model.vllm_shapes(1, 0)), True
        self.receiver: Any = None


class Engines:
    """Two engines, behind the face of an EnginePool; `spoil` is called after each update, `fail` in the middle of it.

    An engine for which `fail` raises ConnectionError ends, with its process: its receiver is closed.
    """

    tensor, stall_seconds = 1, 60.0

    def __init__(self, model: Model) -> None:
        self.model = model
        self.members = [Member(index, model) for index in range(2)]
        self.audits: list[tuple[int, list[int]]] = []
        self.routes: list[list[int]] = []
        self.spoil: Callable[[list[dict[str, Tensor]]], object] = lambda tensors: None
        self.fail: Callable[[Member], object] = lambda member: None
        self.faults: list[tuple[str, int, str]] = []
        self.replaced: list[tuple[int, str]] = []

    def replace(self, member: Member, cause: str) -> None:
        self.replaced.append((member.index, cause))

    def running(self) -> list[Member]:
        return list(self.members)

    def serve(self, members: list[Member]) -> None:
        for member in members:
            member.serves = True

    def end(self, member: Member) -> None:
        member.serves = False
        self.members.remove(member)

    def places(self, members: list[Member]) -> list[list[Place]]:
        return [[here(torch.device("cpu"))] for _ in members]

    def open_update(self, info: dict[str, Any], members: list[Member]) -> bool:
        way = plan(self.model.megatron_tiles(ParallelLayout(**info["layout"])), self.model.vllm_tiles(1))
        route = Route(**info["route"])
        assert route.num_engines == len(members)
        self.routes.append([member.index for member in members])
        for number, member in enumerate(members):
            member.receiver = route.receiver(way, 0, member.tensors, torch.float32, number)
        self.holdings = {m: Holdings(held_parts(way, 0), m.tensors, torch.float32) for m in self.members}
        return True

    def load(self, folder: Path) -> None:
        """Load a folder by themselves, as vLLM does."""
        for member in self.members:
            hf.load(folder, self._own_plan(), 0, member.tensors)

    def open_audit(self, config: dict[str, Any], dtype: str, members: list[Member]) -> None:
        assert config == self.model.config
        way, kind = held_parts(self._own_plan(), 0), getattr(torch, dtype)
        self.holdings = {member: Holdings(way, member.tensors, kind) for member in members}

    def _own_plan(self) -> WeightPlan:
        return plan(self.model.hf_tiles(), self.model.vllm_tiles(1))

    def update(self, version: int, members: list[Member], sending: list[Future[None]]) -> list[Member]:
        def take(member: Member) -> None:
            try:
                self.fail(member)
            except ConnectionError:
                with pytest.raises(TransferError):
                    member.receiver.receive(version + 1)  # leaves the sender in the middle
                raise
            member.receiver.receive(version)

        have = []
        with ThreadPoolExecutor(2) as threads:
            taking = {member: threads.submit(take, member) for member in members}
            for member, running in taking.items():
                try:
                    running.result()
                    have.append(member)
                except ConnectionError:
                    self.end(member)
                except TransferError:
                    member.serves = False
        for running in sending:
            try:
                running.result()
            except TransferError:
                assert len(have) < len(members)
        self.spoil([member.tensors for member in members])
        return have

    def audit(self, version: int, members: list[Member]) -> dict[Member, list[dict[str, Any]]]:
        self.audits.append((version, [member.index for member in members]))
        return {m: [{"digests": self.holdings[m].digests(), "faults": self.faults}] for m in members}

    def digest_rows(self, member: Member, worker: int, index: int) -> list[int]:
        assert worker == 0
        return self.holdings[member].rows(index)


def empty(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


@pytest.fixture
def ends(tied_llama: Path, tmp_path: Path) -> tuple[Any, Any, WeightSync]:
    model = read_model(tied_llama)
    policy, engines = Policy(model, tied_llama), Engines(model)
    sync = WeightSync(policy, engines, model, tmp_path, ConversionConfig(bucket_bytes=20_000))  # type: ignore[arg-type]
    return policy, engines, sync


def test_every_publish_finds_and_names_a_single_wrong_element(ends: tuple[Any, Any, WeightSync]) -> None:
    policy, engines, sync = ends
    for version in range(0, 12, 2):
        policy.tensors[1]["decoder.layers.3.mlp.linear_fc1.weight"].normal_()
        engines.spoil = lambda tensors: None
        sync.publish(version)
        engine, name = version // 2 % 2, f"model.layers.{version % 6}.mlp.down_proj.weight"
        # of the first rank's columns, or of the second's
        engines.spoil = lambda tensors, e=engine, name=name: tensors[e][name][11, 3 + 40 * e].add_(1e-6)
        words = (
            rf"version {version + 1}: worker 0 of engine {engine} does not hold {name} .* digest expected \w{{16}}, got"
        )
        with pytest.raises(WeightMismatch, match=words) as caught:
            sync.publish(version + 1)
        assert (caught.value.tensor, caught.value.row) == (name, 11)
    assert engines.audits == [(version, [0, 1]) for version in range(12)]
    assert engines.routes == [[0, 1]]  # opened once


@pytest.mark.parametrize("hosts", [None, pytest.param(("first", "second"), marks=pytest.mark.slow)])
def test_an_engine_that_ends_in_a_publish_is_left_out_and_the_others_take_it_again(
    hosts: tuple[str, str] | None, tied_llama: Path, tmp_path: Path
) -> None:
    """By shared memory and by gloo, whose ranks hear of it at their deadline of two minutes.

    The one that takes its place gets it alone; the next publish is for both.
    """
    model = read_model(tied_llama)
    policy, engines = Policy(model, tied_llama, hosts), Engines(model)
    sync = WeightSync(policy, engines, model, tmp_path, ConversionConfig(bucket_bytes=20_000))  # type: ignore[arg-type]
    sync.publish(0)
    policy.tensors[0]["decoder.layers.3.mlp.linear_fc1.weight"].normal_()
    first, second = engines.members

    def fail(member: Member) -> None:
        if member is first:
            raise ConnectionError

    engines.fail = fail
    sync.publish(1)
    assert engines.audits[1:] == [(1, [1])] and engines.members == [second] and second.serves
    fresh = Member(0, engines.model)
    engines.members.insert(0, fresh)
    fresh.serves, before = False, {name: tensor.clone() for name, tensor in second.tensors.items()}
    sync.publish(1, [fresh])  # type: ignore[list-item]
    assert engines.audits[2:] == [(1, [0])] and fresh.serves
    assert all(torch.equal(tensor, fresh.tensors[name]) for name, tensor in before.items())
    policy.tensors[0]["decoder.layers.3.mlp.linear_fc1.weight"].normal_()
    sync.publish(2)
    assert engines.audits[3:] == [(2, [0, 1])]
    assert engines.routes == [[0, 1], [1], [0], [0, 1]]
    assert all(torch.equal(tensor, fresh.tensors[name]) for name, tensor in second.tensors.items())


def test_a_replaced_engine_that_does_not_hold_the_weights_draws_nothing(ends: tuple[Any, Any, WeightSync]) -> None:
    _, engines, sync = ends
    sync.publish(0)
    fresh = engines.members[1] = Member(1, engines.model)
    fresh.serves = False
    engines.spoil = lambda tensors: tensors[0]["model.layers.4.mlp.down_proj.weight"][9, 3].add_(1e-6)
    with pytest.raises(WeightMismatch, match=r"worker 0 of engine 1 does not hold model\.layers\.4\.mlp\.down_proj"):
        sync.publish(0, [fresh])  # type: ignore[list-item]
    assert not fresh.serves


def test_engines_that_take_no_publish_are_replaced_and_ones_that_were_end_the_run(
    ends: tuple[Any, Any, WeightSync],
) -> None:
    _, engines, sync = ends

    def fail(member: Member) -> None:
        with pytest.raises(TransferError):
            member.receiver.receive(99)
        raise TransferError("late")

    engines.fail = fail
    sync.publish(0)
    assert engines.replaced == [(0, "engine 0 did not take version 0 in 3 attempts"), (1, ANY)]
    with pytest.raises(ClusterError, match="publish: engine 1 did not take version 0 in 3 attempts"):
        sync.publish(0, [engines.members[1]])
    assert engines.audits == [] and not any(member.serves for member in engines.members)


def test_a_stale_pack_stops_the_run_by_name(ends: tuple[Any, Any, WeightSync]) -> None:
    _, engines, sync = ends
    engines.faults = [("lm_head.weight", 5, "old")]
    with pytest.raises(WeightMismatch, match=r"worker 0 of engine 0 does not hold lm_head.weight .* row 5: old"):
        sync.publish(0)


def test_on_several_hosts_the_weights_go_by_gloo_and_are_proved_all_the_same(tied_llama: Path, tmp_path: Path) -> None:
    """The hosts are names only: the same four ends, which meet at the first rank's store instead of in a file."""
    model = read_model(tied_llama)
    policy, engines = Policy(model, tied_llama, hosts=("first", "second")), Engines(model)
    sync = WeightSync(policy, engines, model, tmp_path, ConversionConfig(bucket_bytes=20_000))  # type: ignore[arg-type]
    assert sync.reason == "gloo: policy, engines and their driver are on CPUs and see 3 different /dev/shm"
    for version in range(2):
        policy.tensors[1]["decoder.layers.3.mlp.linear_fc1.weight"].normal_()
        sync.publish(version)
    assert not list(tmp_path.iterdir())
    engines.spoil = lambda tensors: tensors[0]["model.layers.4.mlp.down_proj.weight"][9, 3].add_(1e-6)
    with pytest.raises(WeightMismatch, match=r"worker 0 of engine 0 does not hold model\.layers\.4\.mlp\.down_proj"):
        sync.publish(2)


def test_engines_that_loaded_the_folder_pass_and_one_that_loaded_anything_else_is_named(untied_qwen2: Path) -> None:
    engines = Engines(read_model(untied_qwen2))
    engines.load(untied_qwen2)
    loaded = LoadedWeights(untied_qwen2, 1, "float32")
    loaded.verify(engines)  # type: ignore[arg-type]
    assert engines.audits == [(0, [0, 1])]
    engines.members[1].tensors["model.layers.2.self_attn.qkv_proj.bias"][197] += 1e-6  # hidden size 192: of the keys
    with pytest.raises(ModelFolderError) as caught:
        loaded.verify(engines)  # type: ignore[arg-type]
    assert str(caught.value).startswith(
        f"{untied_qwen2}: worker 0 of engine 1 loaded another model.layers.2.self_attn.k_proj.bias than "
        "model.safetensors holds, first bad row 5: digest expected "
    )
    engines.load(untied_qwen2)
    engines.faults = [("lm_head.weight", 5, "old")]  # a stale pack
    with pytest.raises(ModelFolderError, match=r"engine 0 loaded another lm_head\.weight than .* row 5: old"):
        loaded.verify(engines)  # type: ignore[arg-type]


def test_weights_that_are_not_finite_are_named_before_an_engine_is_asked(tied_llama: Path, tmp_path: Path) -> None:
    weights = load_file(tied_llama / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    write_export(tmp_path / "model", weights, tied_llama)
    with pytest.raises(ModelFolderError, match=r"NaN or Inf in model\.norm\.weight \(1 values\).*copy the weights"):
        LoadedWeights(tmp_path / "model", 1, "float32")


def test_what_engines_round_when_they_load_is_no_difference(tied_llama: Path) -> None:
    engines = Engines(read_model(tied_llama))
    for member in engines.members:
        member.tensors = {name: t.bfloat16() for name, t in member.tensors.items()}
    engines.load(tied_llama)
    LoadedWeights(tied_llama, 1, "bfloat16").verify(engines)  # type: ignore[arg-type]
    engines.members[0].tensors["model.layers.5.mlp.down_proj.weight"][3, 7] *= 1.01
    with pytest.raises(
        ModelFolderError, match=r"engine 0 loaded another model\.layers\.5\.mlp\.down_proj\.weight .* row 3"
    ):
        LoadedWeights(tied_llama, 1, "bfloat16").verify(engines)  # type: ignore[arg-type]
