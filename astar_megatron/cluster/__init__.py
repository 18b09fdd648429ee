"""Ray: start or attach, and the group of Megatron rank actors."""

import os
import sys

# Ray takes the parent of a driver for its raylet. Where that is process 1, in a container or behind setsid, the driver
# would end without a word when the raylet has ended. Ray reads the variable while it is imported. In its workers it has
# been imported by now, and has set it.
if "ray" not in sys.modules:
    os.environ["RAY_RAYLET_PID"] = str(os.getpid())
