"""The LM head and the loss behind it: hidden states to log-probs of response tokens, no [tokens, vocabulary] logits.

interface.py says what it computes; plain.py, chunked.py and triton_kernels.py compute it (with fused.py around the
last two); output.py hangs it on Megatron's model.
"""
