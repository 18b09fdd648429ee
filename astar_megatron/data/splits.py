"""What the names of a folder's files say: the split that each is of, and which shards are not there."""

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

TRAIN = "train"  # the split where none is asked for
SPLITS = {TRAIN, "validation", "valid", "val", "dev", "test"}
_SHARD = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\b")


def split_of(file: Path, asked: str | None = None) -> str:
    """Return the split that a file's name, or that of a folder around it, has in it; "" where none has, or several."""
    if shard := _SHARD.match(file.name):
        return shard[1]
    for part in reversed(file.parts):
        if asked and re.split(r"[-.]", part)[0] == asked:
            return asked
        if words := SPLITS.intersection(re.split(r"[-._]", part)):
            return words.pop() if len(words) == 1 else ""
    return ""


def missing_shards(files: Iterable[Path]) -> list[str]:
    """Return the names, without their ends, of the shards that are not among `files`, where others of their set are."""
    there: defaultdict[tuple[Path, str, str], set[int]] = defaultdict(set)
    for file in files:
        if shard := _SHARD.match(file.name):
            there[file.parent, shard[1], shard[3]].add(int(shard[2]))
    return [
        f"{name}-{number:05}-of-{count}"
        for (_, name, count), numbers in there.items()
        for number in range(int(count))
        if number not in numbers
    ]
