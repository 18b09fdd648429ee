"""What is said of how a process ended: from its status, from its output, from the kernel's counters."""

from pathlib import Path

import pytest

from astar_megatron.cluster import endings

CORE = "(EngineCore pid=5500) ERROR 11-28 00:24:04 [core.py:1510] "
WORKER = "(Worker_TP1 pid=77) ERROR 11-28 00:24:03 [multiproc_executor.py:902] "


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "ended with exit status 0"),
        (3, "ended with exit status 3"),
        (-11, "was killed by SIGSEGV"),
        (-9, "was killed by SIGKILL (so ends the kernel a process for memory)"),
        (-64, "was killed by SIGRTMAX"),
        (-63, "was killed by signal 63"),
    ],
)
def test_a_status_is_said_in_words(status: int, words: str) -> None:
    assert endings.ended(status) == words


def test_the_error_of_a_worker_goes_before_those_that_point_to_it() -> None:
    output = "\n".join(
        [
            f"{WORKER}Traceback (most recent call last):",
            f'{WORKER}  File "gloo.py", line 7, in device',
            f"{WORKER}RuntimeError: Unable to find address for: nope0",
            f"{CORE}Exception: WorkerProc initialization failed due to an exception in a background process. See stack "
            "trace for root cause.",
            "BrokenPipeError: [Errno 32] Broken pipe",
            "RuntimeError: Engine core initialization failed. See root cause above.",
            "EOFError",
        ]
    )
    assert endings.last_error(output) == "RuntimeError: Unable to find address for: nope0"


def test_that_ray_ended_the_driver_stands_in_the_last_line() -> None:
    words = "[2026-11-28 22:23:04,087 E 620 645] rpc_client.h:204: Failed to connect to GCS within 60 seconds. GCS may"
    assert endings.ended_by_ray(1, f"step 3\n{words}\n")
    assert endings.ended_by_ray(1, "E 13400] Failed to register worker to Raylet: IOError: End of file")
    assert not endings.ended_by_ray(0, words) and not endings.ended_by_ray(1, f"{words}\nastar: no such file")


def test_a_driver_that_ends_without_a_word_once_its_raylet_has_was_ended_by_ray() -> None:
    words = "step 2\n\x1b[33m(raylet)\x1b[0m Raylet is terminated. Its log:\n  [I 77] idle.\n\n  reward: r\n"
    assert endings.ended_by_ray(1, words) and not endings.ended_by_ray(2, words)
    assert not endings.ended_by_ray(1, f"{words}astar: runs/x: no space left")
    assert not endings.ended_by_ray(1, f"{words}Traceback (most recent call last):\n  f()\nKeyError: 'a'\n")
    assert not endings.ended_by_ray(1, "step 2\n")


def test_the_last_of_several_errors_counts() -> None:
    assert endings.last_error("KeyError: 'a'\nduring that:\n\x1b[31mtorch.OutOfMemoryError: b\x1b[0m\nmore") == (
        "torch.OutOfMemoryError: b"
    )


@pytest.mark.parametrize(
    "line",
    [
        "*** SIGSEGV received at time=1795825472 on cpu 1 ***",
        "Fatal Python error: Segmentation fault",
        "terminate called after throwing an instance of 'std::bad_alloc'",
        f"{CORE}Worker proc VllmWorker-1 died unexpectedly (exit code: -9), shutting down executor.",
        f"EngineCore {endings.ended(-9)}",
    ],
)
def test_an_end_without_an_exception_is_found_too(line: str) -> None:
    cause = endings.last_error(f"Loading\n{line}\n")
    assert cause is not None and line.endswith(cause)


def test_output_without_an_error_holds_no_cause() -> None:
    text = "W1128 torch: No CUDA runtime\n  raise ValueError(\nWarning: an Error: in the middle\nEngineCore ended with "
    assert endings.last_error(text + "exit status 0\n") is None


def test_what_follows_the_end_of_a_killed_worker_follows_from_it() -> None:
    death = "Worker proc VllmWorker-1 died unexpectedly (exit code: -9), shutting down executor."
    assert endings.last_error(f"{CORE}{death}\n{CORE}RuntimeError: cancelled\n") == death
    first = endings.last_error(f"{WORKER}ValueError: a\nEngineCore was killed by SIGTERM\nRuntimeError: cancelled\n")
    assert first == "EngineCore was killed by SIGTERM; the last error before: ValueError: a"
    assert endings.last_error("ValueError: a\nEngineCore ended with exit status 1\n") == "ValueError: a"
    assert endings.last_error("EngineCore ended with exit status 1\n") == "EngineCore ended with exit status 1"


def test_the_outputs_of_a_process_are_read_together_and_missing_ones_hold_none(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("fine\n")
    (tmp_path / "out").write_text("x" * 600_000 + "\nValueError: a\n")
    (tmp_path / "err").write_text("ValueError: b\n")
    paths = [tmp_path / name for name in ("none", "empty", "out", "err")]
    assert endings.cause_in(paths) == "ValueError: b"
    assert endings.cause_in(paths[:3]) == "ValueError: a"
    assert endings.cause_in(paths[:2]) is None


def test_the_statuses_that_vllm_names_are_said_in_words() -> None:
    message = "Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': -11}"
    assert endings.is_secondary(message) and endings.is_secondary("EOFError")
    assert not endings.is_secondary("KeyError: 'weights'") and not endings.is_secondary("EOFError: a.pt is cut")
    assert endings.core_end(message) == "EngineCore was killed by SIGSEGV"
    assert endings.core_end("KeyError: 'weights'") is None
    no_word = endings.core_end("RuntimeError: Engine core initialization failed. Failed core proc(s): {}")
    assert no_word and endings.was_killed(no_word)


def test_the_kernels_kills_for_memory_are_those_of_the_group_or_of_the_machine(tmp_path: Path) -> None:
    assert endings.memory_kills(tmp_path) == 0
    for path, text in {
        "proc/vmstat": "pgfault 9\noom_kill 2\n",
        "sys/fs/cgroup/memory.events": "low 0\noom 1\noom_kill 3\noom_group_kill 0\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert endings.memory_kills(tmp_path) == 3


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        (
            "connection error code 2. End of file",
            None,
            "was killed (SIGKILL), or ended itself at once: it left no word",
        ),
        (
            "connection error code 2. End of file",
            "a.TransferError: it was another's",
            "was killed (SIGKILL), or ended itself at once; the last error before: a.TransferError: it was another's",
        ),
        ("connection error code 2.", "EngineCore was killed by SIGKILL", "EngineCore was killed by SIGKILL"),
        ("Worker exits with an exit code 3.", "ValueError: no weights", "ValueError: no weights"),
        ("Worker exits with an exit code 3.", None, "ended with exit status 3"),
        ("Worker exits with an exit code 1. The process receives a SIGTERM", None, "was killed by SIGTERM"),
    ],
)
def test_an_error_of_before_is_not_taken_for_the_end_of_a_killed_process(
    text: str, error: str | None, words: str
) -> None:
    assert endings.end_of_process(text, error) == words
