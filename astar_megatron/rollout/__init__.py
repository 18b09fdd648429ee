"""vLLM: engines as Ray actors, and the pool that generates with them."""
