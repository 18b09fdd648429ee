"""Ways to carry a `WeightPlan` out between processes, in buckets of bounded size (`buckets.py`).

`shared_memory.py` within one machine, `cuda_ipc.py` within one GPU, `process_group.py` (gloo, NCCL) between processes
that share neither; `route.py` chooses. A sender has `send(version)`, a receiver `receive(version)`, both `close()`;
they run at the same time.
"""


class TransferError(RuntimeError):
    """The weights could not be carried over: an end is late, gone, or works by another plan; the message names it."""
