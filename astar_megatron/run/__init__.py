"""What a run is made of, beside its program: inputs, policy and engines, checkpoints, tracking, resources."""
