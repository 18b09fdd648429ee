"""The LM head over tensor-parallel ranks: each holds its columns, all get the whole vocabulary's log-probs."""

from typing import Any

import pytest
import ranks as work
from head_cases import Case, assert_close

# Two ranks split 264 columns (one of them padding), three split 300: the last holds padding alone.
CASES = {
    2: Case(columns=264, size=263, temperature=0.8),
    3: Case(columns=300, size=199, hidden=56, lengths=(4, 21, 0, 9)),
}


@pytest.mark.parametrize("world", CASES)
@pytest.mark.parametrize("head", ["plain", "chunked"])
def test_tensor_parallel_ranks_compute_the_whole_vocabularys_numbers(head: str, world: int, ranks: Any) -> None:
    answers = ranks.run(work.head_errors, world, head=head, case=CASES[world], num_ranks=world)
    for distances, gap in answers:
        assert gap == 0.0
        assert_close(distances, CASES[world])
