"""Settings of these tests, for a machine that others use too."""

import torch
from hypothesis import settings

torch.set_num_threads(1)  # tiny tensors; two threads that wait for each other took 70 times longer
settings.register_profile("shared_machine", deadline=None, derandomize=True)  # there an example is slow at random
settings.load_profile("shared_machine")
