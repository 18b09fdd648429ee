"""Megatron-Core: the only folder that knows ranks and devices."""
