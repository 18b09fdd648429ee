"""Ray: start or attach, and the group of Megatron rank actors."""

import os
import sys

# Ray takes the parent of a driver for its raylet. Where that is process 1, in a container or behind setsid, the driver
# would end without a word when the raylet has ended. Ray reads the variable while it is imported. In its workers it has
# been imported by now, and has set it.
if "ray" not in sys.modules:
    os.environ["RAY_RAYLET_PID"] = str(os.getpid())
    # Below `uv run` Ray would pack the folder in which it is started for its workers, and that is the root.
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    # A hook of the user's other clusters; logs on the output, by which the caretaker would know no process; what Ray's
    # own programs do not run with.
    for name in ("RAY_RUNTIME_ENV_HOOK", "RAY_LOG_TO_STDERR", "PYTHONOPTIMIZE", "PYTHONWARNINGS"):
        os.environ.pop(name, None)
