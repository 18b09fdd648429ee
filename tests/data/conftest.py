"""A model folder with a tiny tokenizer, which the tests of data/ share."""

import json
import struct
from collections.abc import Callable, Sequence

import pytest
import torch

torch.set_num_threads(1)

TEMPLATE = "{% for m in messages %}<u>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Returns a function that makes a new HF folder: byte-level tokenizer, generation config, one small weight file."""

    def make(
        template: str | None = TEMPLATE,
        eos: str | None = "</s>",
        stop: int | Sequence[int] | None = None,
        special: Sequence[str] = (),
    ) -> str:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        folder = tmp_path_factory.mktemp("model")
        tokens = ["</s>", "<u>", "<a>", *special]
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        inner = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens + alphabet)}, merges=[]))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        inner.add_special_tokens(tokens)
        tok = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos, pad_token=eos, chat_template=template)
        tok.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": len(tokens + alphabet)}))
        if stop is not None:
            (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}))
        header = json.dumps({"w": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(range(64)))
        return str(folder)

    return make
