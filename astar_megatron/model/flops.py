"""Model FLOPs of a pack: what the model's matrix products need, two a multiplication and addition.

A forward pass costs, with T stream positions of which a shared prefix is one part, R response positions, H hidden:

    2 * T * (weights of the linear layers, of the experts a token goes to)
  + 4 * (pairs of a token and what it attends to) * heads * head size, in every layer
  + 2 * R * H * vocabulary

and a backward pass twice that (Narayanan et al., arXiv 2104.04473, with attention counted causally and the head at
response positions only). Leaves out: recomputation, which is no work of the model's, and all that is no product.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from conversion.families import Model

if TYPE_CHECKING:  # `astar plan` counts where there is no torch
    from astar_megatron.algorithm.packing import PackedBatch


def forward_flops(model: Model, packed: "PackedBatch") -> int:
    """Return the FLOPs of one forward pass of a pack over the whole model, on however many ranks."""
    return _flops(model, len(packed.token_ids), packed.prefix_tokens, packed.lengths, len(packed.targets))


def drawing_flops(model: Model, prompt_tokens: int, response_tokens: Sequence[int]) -> int:
    """Return those of one forward pass over a prompt's responses of so many tokens, packed behind it: by their lengths.

    The last token of the prompt is the first that a response is predicted from, the last of a response predicts none.
    """
    prefix, num_targets = prompt_tokens - 1, sum(response_tokens)
    return _flops(model, prefix + num_targets, prefix, response_tokens, num_targets)


def head_flops(model: Model, num_targets: int) -> int:
    """Return those of one forward pass of the LM head over so many response positions, a part of the others."""
    return 2 * num_targets * model.dims.hidden_size * model.dims.vocab_size


def _flops(model: Model, num_tokens: int, prefix: int, lengths: Sequence[int], num_targets: int) -> int:
    dims = model.dims
    pairs = _causal_pairs(prefix) + sum(prefix * own + _causal_pairs(own) for own in lengths)
    attention = 4 * pairs * dims.num_heads * dims.head_dim * dims.num_layers
    return 2 * num_tokens * _linear_weights(model) + attention + head_flops(model, num_targets)


def _causal_pairs(num_tokens: int) -> int:
    return num_tokens * (num_tokens + 1) // 2


def _linear_weights(model: Model) -> int:
    """Return how many weights a token is multiplied with in all layers."""
    dims = model.dims
    attention = dims.hidden_size * dims.head_dim * (2 * dims.num_heads + 2 * dims.num_kv_heads)
    if dims.num_experts:
        router = dims.hidden_size * dims.num_experts
        mlp = 3 * dims.hidden_size * dims.moe_intermediate_size * dims.experts_per_token + router
    else:
        mlp = 3 * dims.hidden_size * dims.intermediate_size
    return dims.num_layers * (attention + mlp)
