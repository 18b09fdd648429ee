"""Mistral (7B and its successors of the same class): Llama's rows, without a sliding window.

https://arxiv.org/abs/2310.06825; HF's name is MistralForCausalLM. Left out: the sliding window of the first releases,
which transformers assumes where the configuration does not say `"sliding_window": null`, and Ministral, as which it
opens a configuration with `layer_types`, null too.
"""

from conversion.families import llama
from conversion.families.config import Family

MISTRAL = Family(
    architecture="MistralForCausalLM",
    model_type="mistral",
    rows=llama.ROWS,
    # HF's default for a missing num_key_value_heads is 8, whatever the number of heads.
    required=("num_key_value_heads",),
    explicit=("sliding_window",),
    only={"sliding_window": (None,), "attention_bias": (False,), "mlp_bias": (False,)},
)
