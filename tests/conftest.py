"""What several folders of tests need: tiny models on disk, of both kinds, made by transformers itself."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)  # tiny tensors: waking threads costs more than they do

# No two sizes are equal, six layers divide into two and three stages, the vocabularies are odd.
SIZES: dict[str, Any] = {
    "num_hidden_layers": 6,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "initializer_range": 0.15,  # large enough that a wrong weight shows
}
# What the configurations of the other families have beside the sizes; heads that are no quotient of the hidden size.
_EXPERTS: dict[str, Any] = {"num_experts": 10, "num_experts_per_tok": 3, "moe_intermediate_size": 28, "head_dim": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama3": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 24,
        },
    },
    "mistral": {"sliding_window": None, "head_dim": 20},
    "qwen3": {"head_dim": 32},
    "qwen3_moe": _EXPERTS | {"norm_topk_prob": True},
    "qwen3_moe_unnormed": _EXPERTS | {"model_type": "qwen3_moe", "norm_topk_prob": False},
}
TEMPLATE = "{% for message in messages %}<user>{{ message.content }}{% endfor %}<assistant>"


@pytest.fixture(scope="session")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a tied head, heads of 32 and 263 tokens."""
    transformers = _transformers()
    torch.manual_seed(3)
    config = transformers.LlamaConfig(**SIZES, head_dim=32, vocab_size=263, tie_word_embeddings=True)
    return _write(transformers.LlamaForCausalLM(config), tmp_path_factory.mktemp("tied_llama"))


@pytest.fixture(scope="session")
def untied_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 with a head of its own, biases on q, k and v that are not zero, and 271 tokens."""
    transformers = _transformers()
    torch.manual_seed(4)
    sizes: Any = SIZES | {"hidden_size": 192, "initializer_range": 0.05}
    # Qwen2's heads fill the hidden size, and vLLM's CPU attention takes no head below 32.
    config = transformers.Qwen2Config(**sizes, vocab_size=271, tie_word_embeddings=False)
    model = transformers.Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
    return _write(model, tmp_path_factory.mktemp("untied_qwen2"))


@pytest.fixture(scope="session")
def tiny_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a random model of a family of FAMILIES, with changes to its sizes, and returns its folder."""
    transformers = _transformers()

    def write(family: str, **changes: Any) -> Path:
        sizes = SIZES | {"vocab_size": 263, "tie_word_embeddings": False, "model_type": family}
        config = transformers.AutoConfig.for_model(**(sizes | FAMILIES[family] | changes))
        torch.manual_seed(5)
        return _write(transformers.AutoModelForCausalLM.from_config(config), tmp_path_factory.mktemp(family))

    return write


@pytest.fixture
def cut_name() -> Iterator[None]:
    """This process has a name that the kernel has cut at 15 bytes, inside a letter, as anybody's may be."""
    file = Path("/proc/self/comm")
    name = file.read_bytes().rstrip(b"\n")  # the end of the line is none of it
    file.write_bytes("Testdurchgangsäle".encode()[:15])
    yield
    file.write_bytes(name)


@pytest.fixture
def astar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs `astar ...` in this process and gives exit status, stdout and stderr."""
    from astar_megatron import cli

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["astar", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        out, error = capsys.readouterr()
        return status, out, error

    return run


def _transformers() -> Any:
    """The package; without it or what it writes folders with, the test is skipped by the name of what is missing."""
    return [pytest.importorskip(name) for name in ("tokenizers", "safetensors", "transformers")][-1]


def _write(model: torch.nn.Module, folder: Path) -> Path:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))  # a norm of ones would hide a swap of two norms
    model.save_pretrained(folder)  # type: ignore[operator]
    _tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["vocab_size"] % 2 == 1
    return folder


def _tokenizer() -> Any:
    """One token a character of arithmetic; id 2 ends a response."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<user>", "<assistant>"]
    pieces = [*special, *"0123456789", *"+-= ?.", *"abcdefghijklmnopqrstuvwxyzWA"]
    tokenizer = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=TEMPLATE,
    )
