"""Which model a folder is, by what is read in it."""

from pathlib import Path

from astar_megatron.data.contract import digest_of
from astar_megatron.run.scores import weights_digest
from conversion import ledger, rewrite
from conversion.ends import open_end
from conversion.folders import read_record


def weights_of(folder: Path) -> tuple[str, str]:
    """Return a digest of the model in a Hugging Face folder, and in words why it isn't that of its conversion.json.

    All weights are read. Where they, and config.json, are as recorded the digest is `weights_digest` of the record.
    """
    end = open_end(folder)
    digests = rewrite.read_through(end).digests()
    reason = ledger.doubt(end, digests)
    if not reason and (recorded := weights_digest(read_record(folder))):
        return recorded, ""
    own = {"digests": digests, "config": end.model.computation()}
    return digest_of(own), reason
