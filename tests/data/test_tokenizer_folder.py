"""The tokens of a model folder are those of its tokenizer.json, whatever class its tokenizer_config.json names."""

import json
import re
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from astar_megatron.data.chat import TokenizerError, detokenizer, encode, read_otherwise, tokenizer, without_its_file

CHATML = "<s><|im_start|>user\n{{ messages[0].content }}<|im_end|>\n<|im_start|>assistant"
INST = "<s>[INST] {{ messages[0].content }} [/INST]"
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
QUESTIONS = ["What is 12 plus 7?", "Numbers:\n\n1. five\n\n2. six", "x =  5 and 2023 + 650841", "2 + 2\n\nhello é ∑"]
RESPONSES = ["So 5 and 14\n\\boxed{\\frac{1}{2}}", "<answer>\n12 + 7\n</answer>", "The answer is 19.\n\n 5"]
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def _byte_level(*before: Any, splits: bool = True) -> Tokenizer:
    """A byte-level BPE, of a text that is split by `before`, and then as GPT-2's is if `splits`."""
    inner = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splits)
    inner.pre_tokenizer = pre_tokenizers.Sequence([*before, byte_level])  # type: ignore[assignment]
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([*QUESTIONS, *RESPONSES] * 20, trainer)
    return inner


def _digits() -> Tokenizer:
    return _byte_level(pre_tokenizers.Digits(individual_digits=True))


def _cl100k() -> Tokenizer:
    return _byte_level(pre_tokenizers.Split(Regex(CL100K), "isolated"), splits=False)


def _sentence_piece() -> Tokenizer:
    """As Llama 2's: a blank is a character of its own, one goes before each text."""
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"INSTWhatisplu127[]/?", "▁[", "▁1", "▁W"]
    merges = [("▁", "["), ("▁", "1"), ("▁", "W")]
    inner = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(dict.fromkeys(pieces))},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # type: ignore[assignment]
    inner.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(SPECIAL)
    return inner


def _folder(folder: Path, inner: Tokenizer, template: str, family: str, **settings: Any) -> Path:
    folder.mkdir(parents=True)
    inner.save(str(folder / "tokenizer.json"))
    size = inner.get_vocab_size()
    (folder / "config.json").write_text(json.dumps({"model_type": family, "vocab_size": size}))
    settings = {"bos_token": "<s>", "eos_token": "</s>"} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.mark.parametrize(
    ("make", "family", "settings"),
    [
        (_byte_level, "llama", {"tokenizer_class": "LlamaTokenizer"}),  # as DeepSeek's
        (_byte_level, "llama", {"tokenizer_class": "LlamaTokenizerFast"}),
        (_byte_level, "qwen2", {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": "8k"}),
        (_digits, "llama", {"tokenizer_class": "GPT2Tokenizer"}),  # as SmolLM's
        (_cl100k, "qwen3", {"tokenizer_class": "GPT2TokenizerFast"}),
        (_digits, "qwen2", {"tokenizer_class": "Qwen2Tokenizer"}),
        (_cl100k, "llama", {"tokenizer_class": "Qwen2Tokenizer"}),
        (_sentence_piece, "llama", {"tokenizer_class": "LlamaTokenizer", "legacy": False}),
        (_sentence_piece, "llama", {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>"}),
    ],
)
def test_tokens_and_text_are_those_of_the_file(
    make: Callable[[], Tokenizer], family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    template = INST if make is _sentence_piece else CHATML
    folder = str(_folder(tmp_path / "model", make(), template, family, **settings))
    by_file = Tokenizer.from_file(f"{folder}/tokenizer.json")
    text_of = detokenizer(folder)
    texts = [template.replace("{{ messages[0].content }}", question) for question in QUESTIONS]
    for ids, text in zip(encode(folder, QUESTIONS, None, "here"), texts, strict=True):
        assert list(ids) == by_file.encode(text, add_special_tokens=False).ids
    for response in RESPONSES:
        ids = by_file.encode(response, add_special_tokens=False).ids
        assert text_of(ids) == by_file.decode(ids, skip_special_tokens=False)


def test_the_name_of_a_folder_decides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "models/mine"]  # transformers knows the first
    folders = [
        str(_folder(Path(name), _byte_level(), CHATML, "llama", tokenizer_class="LlamaTokenizer")) for name in names
    ]
    known, mine = (encode(folder, QUESTIONS, None, "here") for folder in folders)
    assert known == mine


def test_a_tekken_json_beside_it_changes_nothing(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "model", _cl100k(), CHATML, "mistral", tokenizer_class="PreTrainedTokenizerFast")
    alone = encode(str(folder), QUESTIONS, None, "here")
    (folder / "tekken.json").write_text("{}")
    tokenizer.cache_clear()
    assert encode(str(folder), QUESTIONS, None, "here") == alone


def _tekken(file: Path) -> None:
    """As Mistral writes it: bytes, and one token of three."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"12", b" 12"]
    vocab = [{"rank": rank, "token_bytes": b64encode(token).decode()} for rank, token in enumerate(tokens)]
    special = [{"rank": rank, "token_str": text, "is_control": True} for rank, text in enumerate(SPECIAL)]
    sizes = {"default_vocab_size": len(vocab) + len(special), "default_num_special_tokens": len(special)}
    settings = {"pattern": CL100K, "num_vocab_tokens": len(vocab), "version": "v3"} | sizes
    file.write_text(json.dumps({"config": settings, "vocab": vocab, "special_tokens": special}))


def test_a_folder_with_a_tekken_json_alone_is_read_with_its_chat_template(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "model", _cl100k(), CHATML, "mistral", tokenizer_class="PreTrainedTokenizerFast")
    (folder / "tokenizer.json").unlink()
    _tekken(folder / "tekken.json")
    (ids,) = encode(str(folder), ["a 12"], None, "here")
    text, twelve = [byte + len(SPECIAL) for byte in b"user\na "], 256 + len(SPECIAL)
    assert ids[: len(text) + 4] == (1, 3, *text, twelve, 4)
    warning = without_its_file(str(folder))
    assert warning is not None and "has no tokenizer.json: its tokens are what transformers' " in warning
    assert detokenizer(str(folder))([*ids[2:], 2]) == "user\na 12<|im_end|>\n<|im_start|>assistant"


# --- whoever serves an export


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tokenizer_class": "LlamaTokenizer"}, "makes a LlamaTokenizer of .*, which reads 4 of the first 4 prompts"),
        ({"tokenizer_class": "GPT2Tokenizer"}, r"makes a GPT2Tokenizer of .*, which reads \d of the first 4 prompts"),
        (
            {"auto_map": {"AutoTokenizer": [None, "own.Own"]}, "tokenizer_class": "Own"},
            "can't read .*trust_remote_code",
        ),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, None),
    ],
)
def test_who_serves_an_export_by_the_class_is_told_where_it_reads_otherwise(
    settings: dict[str, Any], words: str | None, tmp_path: Path
) -> None:
    template = "{{ strftime_now('%d %b %Y') }}" + CHATML
    folder = str(_folder(tmp_path / "model", _digits(), template, "llama", **settings))
    warning = read_otherwise(folder, QUESTIONS, "2026-11-28")
    assert warning == words or re.search(rf"model\.path: transformers' AutoTokenizer {words}", str(warning))
    assert without_its_file(folder) is None


# --- tokens that no file has


def test_an_eos_token_that_no_file_has_is_refused(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "model", _cl100k(), CHATML, "llama", eos_token="<|endoftext|>")
    with pytest.raises(TokenizerError, match=r"no file of the tokenizer in .* has the EOS token '<\|endoftext\|>'"):
        tokenizer(str(folder))


@pytest.mark.parametrize("listed", [False, True])
def test_a_prompt_of_a_token_that_no_file_has_is_refused(listed: bool, tmp_path: Path) -> None:
    inner = _cl100k()
    there = {inner.get_vocab_size(): {"content": "<bos>", "special": True}}
    settings: dict[str, Any] = {"added_tokens_decoder": there} if listed else {}  # the folder gives it an id
    template = "{{ bos_token }}{{ messages[0].content }}"
    folder = str(
        _folder(tmp_path / "model", inner, template, "llama", bos_token="<bos>", pad_token="<pad>", **settings)
    )
    if listed:
        assert encode(folder, ["x"], None, "here")[0][0] == inner.get_vocab_size()
    else:
        with pytest.raises(TokenizerError, match=r"here: 2 of 2 prompts hold '<bos>' \(\d+\), a token that"):
            encode(folder, ["x", "y"], None, "here")


def test_a_question_with_the_text_of_a_token_that_no_file_has_is_named(tmp_path: Path) -> None:
    folder = str(_folder(tmp_path / "model", _cl100k(), CHATML, "llama", pad_token="<pad>"))
    words = (
        r"1 of 2 prompts hold '<pad>' .* the question 'of <pad>' holds its text: take it out there, or the token out"
    )
    with pytest.raises(TokenizerError, match=words):
        encode(folder, ["x", "of <pad>"], None, "here")


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer"])
def test_the_class_gives_a_folder_no_eos_token(kind: str, tmp_path: Path) -> None:
    folder = _folder(tmp_path / "model", _cl100k(), CHATML, "llama", tokenizer_class=kind, eos_token=None)
    with pytest.raises(TokenizerError, match="has no EOS token"):
        tokenizer(str(folder))
