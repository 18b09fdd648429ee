"""The LM head and the loss behind it: hidden states to log-probs of response tokens, no [tokens, vocabulary] logits.

interface.py says what it computes; chunked.py and triton_kernels.py compute it, with fused.py around them; output.py
hangs it on Megatron's model. tests/model/plain_head.py is the same written down, with all logits at once.
"""

# Of the logits that may lie in memory, in float32; a GPU's products want larger ones.
CPU_LOGITS_BYTES, GPU_LOGITS_BYTES = 160 << 20, 1 << 30
