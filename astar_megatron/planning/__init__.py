"""What a run will take before anything of it exists: memory, seconds, GPU hours, and settings with which it fits."""
