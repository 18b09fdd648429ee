"""The header of a V* table: the contract that its rows were made under. Written once, by whoever is first.

Nobody replaces it, not even while the table has no rows: another job may be drawing for it.
"""

import json
from pathlib import Path

from astar_megatron.data.contract import Contract, ContractError, Value
from astar_megatron.data.files import storage_error, write_json
from astar_megatron.data.shards import TableError

FORMAT = 1  # raise it when an older reader would misread a shard; a new column is no reason
_NAMES = ("this run", "the table")


class MissingTableError(TableError, FileNotFoundError):
    """There is no V* table, or it lacks rows that are needed."""


def make_header(folder: Path, contract: Contract) -> None:
    """Write the header of a table that has none; what is there stays, whatever it says. Raises StorageError."""
    header = {"format": FORMAT, "contract": contract.fields()}
    write_json(folder / "header.json", header, replace=False)


def stored_contract(folder: Path) -> dict[str, Value]:
    """Return the fields of the contract that the table was made under.

    Raises MissingTableError, TableError (newer format, not a header, shards without one) and StorageError.
    """
    path = folder / "header.json"
    try:
        header = json.loads(path.read_bytes())
        version, stored = header["format"], dict(header["contract"])
        if type(version) is not int or version < 1:  # True is an int too
            raise TypeError(f"format: got {version!r}, expected {FORMAT}")
    except FileNotFoundError:
        if any(folder.glob("shard-*")):
            raise TableError(
                f"{folder}: V* shards without header.json, which says what they were made under; restore it from where "
                "they come from, or choose another sweep.table"
            ) from None
        raise MissingTableError(
            f"{folder}: no V* table here; run `astar sweep` with this configuration first"
        ) from None
    except OSError as error:
        raise storage_error(f"{path}: can't read the V* table's header", error) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise TableError(
            f"{path}: not the header of a V* table ({error}); restore it or choose another sweep.table"
        ) from error
    if version > FORMAT:
        raise TableError(
            f"{folder}: the V* table has format {version}, this astar_megatron reads up to {FORMAT}; "
            "use the version that wrote it or a later one"
        )
    return stored


def differences(folder: Path, contract: Contract) -> list[str]:
    """Return in words how the table's contract differs from this run's; none: the run may use the table.

    Raises what `stored_contract` does.
    """
    stored = stored_contract(folder)
    lines = contract.difference(stored, _NAMES)
    if contract.is_of_other_rule(stored):
        fields = {name: contract.fields()[name] for name in ("model_digest", "digest_rule")}
        lines[0] += (
            "; if you know that the table was drawn with the model of model.path, set these in the contract of its "
            f"header.json: {json.dumps(fields)}"
        )
    return lines


def check_header(folder: Path, contract: Contract | None) -> None:
    """Raise ContractError (field by field) unless the table is of this contract; None takes any.

    Raises what `differences` does too.
    """
    if contract is None:
        stored_contract(folder)
    elif lines := differences(folder, contract):
        raise ContractError(
            f"{folder}: the V* table was made under another contract, its rewards do not fit this run:\n  "
            + "\n  ".join(lines)
            + "\nset your settings as the table has them, or choose another sweep.table and run `astar sweep`"
            + ("" if any(folder.glob("shard-*")) else f"; it has no rows yet: if no job draws for it, delete {folder}")
        )
