"""What a dry run of a conversion shows: from which file to which rank."""

import re
from collections import Counter
from collections.abc import Collection, Iterable

from astar_megatron.cluster.placement import counted

LINKS_SHOWN = 16  # more are summed up


def links(reads: dict[str, int], links: dict[tuple[str, str], int]) -> Iterable[tuple[str, str]]:
    """Who gives how much to whom: each link, or of many the least and the most that an end gives or gets."""
    if len(links) <= LINKS_SHOWN:
        in_order = sorted(links.items(), key=lambda link: [_numbered(name) for name in link[0]])
        return [(f"{source} -> {target}", size_text(size)) for (source, target), size in in_order]
    gets: Counter[str] = Counter()
    for (_, target), size in links.items():
        gets[target] += size
    ends = f"{len(gets)} ranks" if all(name.startswith("rank ") for name in gets) else counted(len(gets), "file")
    return [
        (f"each of {counted(len(reads), 'file')} gives", _range(reads.values())),
        (f"each of {ends} gets", _range(gets.values())),
        ("a link", f"{_range(links.values())}, {len(links):,} of them"),
    ]


def _numbered(name: str) -> list[int | str]:
    """A name's place in an order where rank 2 is before rank 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _range(sizes: Collection[int]) -> str:
    return " to ".join(dict.fromkeys((size_text(min(sizes)), size_text(max(sizes)))))


def size_text(num_bytes: int) -> str:
    """Return a size in the largest unit that it fills."""
    for unit, size, digits in (("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 1)):
        if num_bytes >= size:
            return f"{num_bytes / size:.{digits}f} {unit}"
    return f"{num_bytes} bytes"
