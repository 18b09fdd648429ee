"""From which files of a model's folder its tokens are: tokenizer.json where there is one, whatever class is named.

transformers 5 builds the class that tokenizer_config.json names anew, with that class's own way to split a text and to
read tokens back, and takes vocabulary and merges alone from tokenizer.json. A class that is not the file's loses line
ends and blanks, or splits numbers otherwise than the model was trained on.
"""

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def file_of(model_path: str) -> Path:
    """Return where the file with the tokens of a model is, if there is one."""
    return Path(model_path) / "tokenizer.json"


def settings(model_path: str) -> dict[str, Any]:
    """Return what tokenizer_config.json says."""
    file = Path(model_path) / "tokenizer_config.json"
    return json.loads(file.read_bytes()) if file.exists() else {}


def load(model_path: str) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of an HF folder, from local files only; runs no code of the folder's own. Raises anything.

    Without a tokenizer.json transformers builds it from the other files, by the class that is named.
    """
    from transformers import PreTrainedTokenizerFast  # here, because the import takes seconds

    if file_of(model_path).exists():
        # What its settings say of lengths is not asked: prompts are checked against the model's and the run's.
        return PreTrainedTokenizerFast.from_pretrained(
            model_path, local_files_only=True, trust_remote_code=False, model_max_length=None
        )
    # A folder with a tekken.json would get a class that knows no chat template of the folder.
    return by_class(model_path, mistral_format=False)


def by_class(model_path: str, mistral_format: bool | None = None) -> "PreTrainedTokenizerBase":
    """Return the tokenizer as most serve a folder, of the class that is named; `load` otherwise. Raises anything."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        model_path,
        local_files_only=True,
        trust_remote_code=False,
        model_max_length=None,
        mistral_format=mistral_format,
    )


@functools.lru_cache(maxsize=4)
def invented(tok: "PreTrainedTokenizerBase") -> dict[int, str]:
    """Return the tokens, id and text, that some setting names but no file of the folder gives an id.

    transformers gives them the next ids, whose rows no training ever touched.
    """
    from tokenizers import Tokenizer

    file = file_of(tok.name_or_path)
    own = Tokenizer.from_file(str(file)).get_vocab() if file.exists() else {}
    listed = {(str(token), token_id) for token_id, token in tok.init_kwargs.get("added_tokens_decoder", {}).items()}
    size = tok.vocab_size  # of the vocabulary without what was added to it
    return {
        token_id: token.content
        for token_id, token in tok.added_tokens_decoder.items()
        if token_id >= size and token.content not in own and (token.content, token_id) not in listed
    }
