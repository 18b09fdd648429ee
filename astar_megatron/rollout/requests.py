"""What the programs ask engines for, and with which seeds.

Every response has a seed of its own, a digest of (run, purpose, prompt, step or sample), so any subset of a sweep
reproduces and no two prompts share their random numbers.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence

from astar_megatron.types import Prompt, Request


def seed_of(run_seed: int, *names: object) -> int:
    """Return the 63-bit seed of one response; `names` say which, for example ("sweep", uid, sample)."""
    text = "\x00".join(str(part) for part in (run_seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stage_1_request(run_seed: int, prompt: Prompt, sample: int) -> Request:
    """Return what a sweep asks for: sample number `sample` of a prompt."""
    return Request(prompt=prompt, sample=sample, seed=seed_of(run_seed, "sweep", prompt.uid, sample))


def training_requests(run_seed: int, step: int, prompts: Sequence[Prompt], group_size: int = 1) -> list[Request]:
    """Return `group_size` requests a prompt, one after the other.

    A prompt that a batch across two epochs holds twice gets twice as many samples.
    """
    seen: Counter[str] = Counter()
    requests = []
    for prompt in prompts:
        for sample in range(seen[prompt.uid], seen[prompt.uid] + group_size):
            seed = seed_of(run_seed, "train", step, prompt.uid, sample)
            requests.append(Request(prompt=prompt, sample=sample, seed=seed))
        seen[prompt.uid] += group_size
    return requests


def evaluation_requests(
    run_seed: int, set_name: str, prompts: Sequence[Prompt], num_samples: int | None
) -> list[Request]:
    """Return `num_samples` requests a prompt, one after the other; None: one for the greedy response."""
    return [
        Request(
            prompt=prompt,
            sample=sample,
            seed=seed_of(run_seed, "eval", set_name, prompt.uid, sample),
            greedy=num_samples is None,
        )
        for prompt in prompts
        for sample in range(num_samples or 1)
    ]
