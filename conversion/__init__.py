"""Move weights between layouts: HF files, Megatron ranks and vLLM workers, each end to each other, by one mechanism.

    tiles.py       a layout is a list of tiles: this rectangle of this HF parameter lies there, on that rank
    families/      one declarative table per architecture gives the tiles of every layout
    plan.py        the intersection of two lists of tiles: which rectangle goes from where to where
    transfer/      carries a plan out between processes, in buckets of bounded size
    verify.py      digests of what each end holds: the proof that it arrived
    hf.py  megatron.py  vllm.py     the three kinds of end

HF import, HF export, trainer -> engine sync and checkpoint reshape are all `plan(source tiles, target tiles)`.
Importing this package imports no torch; tiles, families and plan need none.
"""
