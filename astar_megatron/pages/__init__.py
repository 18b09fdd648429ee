"""A run to look at: one HTML page with its curves, timelines and rollouts."""
