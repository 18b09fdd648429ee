"""A process in which Triton's kernels run on the CPU: the interpreter is chosen when Triton is imported."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from typing import Any

import pytest


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable[..., Any]]:
    """Call a function in that process."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed: its kernels can't be interpreted")
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    before = dict(os.environ)
    os.environ.update(environment)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(os.getpid).result()  # the process has started, with the environment
        os.environ.clear()
        os.environ.update(before)
        yield lambda function, *arguments: pool.submit(function, *arguments).result()
