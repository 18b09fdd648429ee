"""A reward whose response says how it shall fail."""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Timer


def reward(response: str, answer: str) -> float:
    """Return 0.5, or what the response asks for."""
    print("rewards may print", file=sys.stdout)
    match response:
        case "hang":
            re.match("(a+)+$", "a" * 60 + "b")  # in C: neither a thread nor a signal's handler would run
        case "die":
            os._exit(3)
        case "raise":
            raise KeyError("boom")
        case "nan":
            return math.nan
        case "two":
            return 2.0
        case "text":
            return "1.0"  # type: ignore[return-value]
        case "nothing":
            return None  # type: ignore[return-value]
    if answer.startswith("touch "):
        Path(answer.removeprefix("touch ")).touch()
        re.match("(a+)+$", "a" * 60 + "b")
    if answer == "slow":
        time.sleep(600)
    if answer == "unreadable":
        raise ValueError("answer: expected something else")
    return 0.5


def echo(response: str, answer: str) -> float:
    """Return the answer, after what the response asks for."""
    match response:
        case "fork":
            if os.fork() == 0:
                time.sleep(0.2)  # until its parent has answered
        case "stops":
            Timer(0.1, os.kill, (os.getpid(), signal.SIGSTOP)).start()
        case "stops its keeper":
            os.kill(os.getppid(), signal.SIGSTOP)
            time.sleep(600)
        case "closes its input":
            os.close(0)
        case "closes its output":
            os.closerange(3, 100)
        case "writes more" | "writes junk":
            for descriptor in range(3, 100):
                with contextlib.suppress(OSError):
                    os.write(descriptor, b'[3, 0.125, ""]\n' if response == "writes more" else b"junk\n")
    return float(answer)


def start(response: str, answer: str) -> float:
    """Wait for a program whose process number is written to the file `answer`."""
    with subprocess.Popen(["sleep", "600"]) as program:
        Path(answer).write_text(str(program.pid))
    return 0.5


def bomb(response: str, answer: str) -> float:
    """Fork until there are 64 processes, half of them in sessions of their own, then do as the response says."""
    own = os.getpid()
    for generation in range(6):
        if os.fork() == 0 and generation % 2:
            os.setsid()
    with Path(answer).open("a") as file:
        file.write(f"{os.getpid()}\n")
    if response == "die" and os.getpid() == own:
        time.sleep(1.0)  # until the others have written
        os._exit(3)
    while True:
        time.sleep(600)


def tell(response: str, answer: str) -> float:
    """Write what this process has of its driver to the file `answer`."""
    open_files = [os.path.realpath(file) for file in Path("/proc/self/fd").iterdir()]
    inherited = Path("/proc/self/environ").read_bytes().decode().split("\0")
    own_input = os.path.realpath("/proc/self/fd/0")
    told = {"environ": dict(os.environ), "inherited": inherited, "files": open_files, "input": own_input}
    Path(answer).write_text(json.dumps(told))
    return 0.5


def fill(response: str, answer: str) -> float:
    """Return 0.5 after writing to as many MiB as the response says."""
    bytearray(int(response) << 20)
    return 0.5
