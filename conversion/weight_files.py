"""Which files of an HF folder are its weights, by their names alone: one safetensors file, or those of an index."""

import json
from pathlib import Path

from conversion.folders import ModelFolderError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def weight_files(folder: Path) -> dict[str, set[str] | None]:
    """Return the weight files of a folder, each with the tensors the index says it holds (None: whatever it holds).

    Raises ModelFolderError where they are not all there, or not all of them would be read.
    """
    if not (folder / INDEX).exists():
        if (folder / WEIGHTS).exists():
            return {WEIGHTS: None}
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        if pickled:
            raise ModelFolderError(f"{folder}: {pickled[0]} is a pickle checkpoint, which is refused: use safetensors")
        raise ModelFolderError(f"{folder} has neither {WEIGHTS} nor {INDEX}: copy the weights there too")
    try:
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        if wrong := [file for file in weight_map.values() if not isinstance(file, str)]:
            raise TypeError(f"weight_map names the file {wrong[0]!r}")
        files: dict[str, set[str] | None] = {file: set() for file in weight_map.values()}
        for name, file in weight_map.items():
            files[file] = (files[file] or set()) | {name}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelFolderError(f"{folder / INDEX} is no safetensors index: {error!r}; copy the file again") from error
    for file in files:
        if Path(file).name != file or file in ("", ".", ".."):
            raise ModelFolderError(f"{folder / INDEX} names {file!r}, which is not a file of this folder")
        if not (folder / file).exists():
            raise ModelFolderError(f"{folder / INDEX} names {file}, which is missing: copy it there too")
    if (folder / WEIGHTS).exists() and files.keys() != {WEIGHTS}:
        raise ModelFolderError(
            f"{folder} holds {WEIGHTS} beside {INDEX}, which names other files: transformers would read the first "
            f"alone, vLLM those of the index; move away {WEIGHTS}, or the index with its files; or, if it is one of "
            "the index's, give it another name, there too"
        )
    return files


def check_engines_read(folder: str | Path) -> None:
    """Raise ModelFolderError where vLLM would load other files of the folder than those that are read here.

    Without an index it loads every *.safetensors of a folder, one after the other.
    """
    folder = Path(folder)
    others = sorted(path.name for path in folder.glob("*.safetensors") if path.name != WEIGHTS)
    if others and not (folder / INDEX).exists():
        raise ModelFolderError(
            f"{folder} holds {', '.join(others)} beside {WEIGHTS}, and no {INDEX} that says which are the weights: "
            f"{WEIGHTS} alone is read here, but vLLM would load all of them over each other; move the others away "
            "(merge an adapter first, if it belongs to the model)"
        )
