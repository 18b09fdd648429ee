"""Ray: start or attach, and the group of Megatron rank actors."""
