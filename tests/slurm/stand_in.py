#!/usr/bin/env python3
"""What stands in for Python in tests of the batch scripts: a Ray of sockets, and programs that are configurations.

The head listens and keeps a connection to each node that has joined with the right token. `doctor` waits for the nodes.
Any other command runs its --config as a Python script, in which WORDS are the command's words; of a launched run, whose
configuration is JSON, that script is the value of data.suffix, and CONFIG all of it.
"""

import json
import os
import runpy
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

PLANTED = "sleep 100000"  # what a session leaves that was not ended in order


def value(words: list[str], flag: str) -> str:
    """The value of `--flag=value` or `--flag value`."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
        if word == flag:
            return following
    raise SystemExit(f"{flag} is not in {words}")


def token() -> str:
    assert not {"RAY_AUTH_TOKEN", "RAY_ADDRESS"} & os.environ.keys()  # which Ray would take instead
    file = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert os.environ["RAY_AUTH_MODE"] == "token" and file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    return file.read_text().strip()


def start(words: list[str]) -> None:
    """Be Ray's head, or a node that joins it."""
    name = value(words, "--node-name")
    if name in os.environ.get("ABSENT", "").split():
        raise SystemExit("this node does not join")
    logs = Path(value(words, "--temp-dir")) / "session_1_1" / "logs"
    logs.mkdir(parents=True)
    (logs / "raylet.out").write_text(f"of {name}\n")
    subprocess.Popen(PLANTED.split(), start_new_session=True)
    Path(f"/dev/shm/sem.{Path(os.environ['TMPDIR']).name}-planted").touch()
    print("Ray runtime started.", flush=True)
    if "--head" not in words:
        host, _, port = value(words, "--address").rpartition(":")
        with socket.create_connection((host, int(port))) as head:
            head.sendall(f"join {name} {token()}\n".encode())
            head.recv(1)  # until the head ends
        return
    joined, own = {name}, token()

    def answer(caller: socket.socket) -> None:
        with caller, caller.makefile() as lines:
            verb, *rest = lines.readline().split() or [""]  # a mere knock
            if verb == "names":
                caller.sendall((" ".join(joined) + "\n").encode())
            elif verb == "join" and rest[1] == own:
                joined.add(rest[0])
                lines.read()  # until that node ends
                joined.discard(rest[0])

    address = value(words, "--node-ip-address"), int(value(words, "--port"))
    with socket.create_server(address) as server:
        while True:
            threading.Thread(target=answer, args=(server.accept()[0],), daemon=True).start()


def names(address: str) -> set[str]:
    """The nodes that have joined a head."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port))) as head, head.makefile() as lines:
            head.sendall(b"names\n")
            return set(lines.readline().split())
    except OSError:
        return set()


def doctor(words: list[str]) -> None:
    """Wait for the nodes; leave out what is absent, where there are so many spare ones."""
    wanted, until = set(value(words, "--nodes").split(",")), time.monotonic() + float(value(words, "--seconds"))
    while (missing := wanted - names(value(words, "--cluster"))) and time.monotonic() < until:
        time.sleep(0.1)
    bad = missing | wanted & set(os.environ.get("BAD", "").split())
    print(f"run folder: {Path.cwd()}")
    enough = len(bad) <= int(value(words, "--spare"))
    for node in sorted(bad):
        print(f"left out: {node}" if enough else f"{node} is bad")
    raise SystemExit(not enough)


def main() -> None:
    _, module, *words = sys.argv[1:]
    if module == "ray.scripts.scripts":
        return start(words)
    assert token()
    if words[0] == "doctor":
        return doctor(words)
    joined = names(value(words, "cluster.address"))
    config = value(words, "--config")
    if config.endswith(".json"):
        tree = json.loads(Path(config).read_text())
        exec(tree["data"]["suffix"], {"WORDS": words, "JOINED": joined, "CONFIG": tree})
    else:
        runpy.run_path(config, {"WORDS": words, "JOINED": joined})


if __name__ == "__main__":
    main()
