"""Which way weights go follows from where the ends are, and the reason says so."""

import json

import pytest

from conversion.transfer import TransferError
from conversion.transfer.cuda_ipc import HANDLE_BYTES, packed, unpacked
from conversion.transfer.route import Place, choose

ONE_TO_ONE = {(0, 0), (1, 1)}
ALL_TO_ALL = {(source, target) for source in range(2) for target in range(2)}


def places(*names: str) -> list[Place]:
    """`host` or `host/device` each."""
    split = [name.partition("/") for name in names]
    return [Place(memory=host, device=device) for host, _, device in split]


@pytest.mark.parametrize(
    ("sources", "engines", "links", "way", "words"),
    [
        (("a", "a"), [("a", "a"), ("a", "a")], ALL_TO_ALL, "shared memory", "on CPUs and see one /dev/shm"),
        (("a", "a"), [("a", "a"), ("b", "b")], ALL_TO_ALL, "gloo", "2 different /dev/shm"),
        (("a", "b"), [("a", "c")], ONE_TO_ONE, "gloo", "3 different /dev/shm"),
        (("b", "b"), [("b", "b")], ALL_TO_ALL, "gloo", "2 different /dev/shm"),
        (("b/0", "b/1"), [("b/0", "b/1")], ONE_TO_ONE, "gloo", "some ends share a GPU"),
        (("a/0", "a/1"), [("a/0", "a/1")], ONE_TO_ONE, "cuda ipc", "on the GPU of the workers"),
        (("a/0", "a/1"), [("a/0", "a/1"), ("a/0", "a/1")], ONE_TO_ONE, "cuda ipc", "on the GPU of the workers"),
        (("a/0", "a/1"), [("a/0", "a/1")], ALL_TO_ALL, "shared memory", "some ends share a GPU and others do not"),
        (("a/0", "a/1"), [("a/2", "a/3"), ("b/4", "b/5")], ALL_TO_ALL, "nccl", "a GPU of its own"),
        (("a/0", "a/1"), [("a/2", "a/3")], ONE_TO_ONE, "nccl", "not been run on a GPU yet"),
        (("a/0", "a/0"), [("a/2", "a/3")], ALL_TO_ALL, "shared memory", "some ends share a GPU"),
        (("a/0", "b/0"), [("a/0", "b/0")], ONE_TO_ONE, "gloo", "some ends share a GPU"),
        (("a/0", "a/1"), [("a", "a")], ALL_TO_ALL, "shared memory", "or have none"),
        (("a", "a"), [("a/0", "b/1")], ALL_TO_ALL, "gloo", "or have none"),
    ],
)
def test_the_way_follows_from_the_places(
    sources: tuple[str, ...], engines: list[tuple[str, ...]], links: set[tuple[int, int]], way: str, words: str
) -> None:
    chosen, reason = choose(places(*sources), [places(*engine) for engine in engines], links, "a")
    assert chosen == way and words in reason


def test_a_handle_of_a_gpus_memory_is_read_as_it_was_written() -> None:
    shared = [b"\x01" * 66, 4096, 512, b"/torch_12_34", 8, b"\x02" * 64, True]
    text = packed("GPU-1234", shared)
    assert len(text) == HANDLE_BYTES and unpacked(text) == ("GPU-1234", shared)
    values = json.loads(text)
    for wrong in (
        b" " * HANDLE_BYTES,
        b"\x80\x04K\x01.",
        json.dumps([*values[:2], "12", *values[3:]]).encode(),
        json.dumps([values[0], "no hex", *values[2:]]).encode(),
        json.dumps(values[:-1]).encode(),
        b"[]",
        b"{}",
    ):
        with pytest.raises(TransferError, match="no handle of CUDA IPC"):
            unpacked(wrong)
    with pytest.raises(TransferError, match="there is room for"):
        packed("GPU-1234", [b"\x01" * HANDLE_BYTES, *shared[1:]])
