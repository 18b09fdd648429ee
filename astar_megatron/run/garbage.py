"""How often the driver looks for cycles of objects that nothing else refers to."""

import gc

_OBJECTS = 200_000  # made and not dropped, before the newest are looked through


def collect_seldom() -> None:
    """Look seldom, and not at what is there now, which stays as long as the process.

    A step beside 8,192 ranks makes some hundred thousand objects without a cycle. To look through all of them, over and
    over, took a third of the driver's time, and the more the more there were (tests/benchmarks/scale.py).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_OBJECTS, 50, 50)
