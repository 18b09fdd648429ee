"""Ranks have an environment of their own: loopback, which two nodes of another test do not meet on."""

import os
from typing import Any

import ranks as work


def test_what_ranks_are_started_with_does_not_stay_in_the_process_that_starts_them(ranks: Any) -> None:
    assert ranks.run(work.gloo_interface, 2) == ["lo", "lo"]
    assert os.environ.get("GLOO_SOCKET_IFNAME") != "lo"
