"""Starting runs elsewhere: Slurm by sbatch or by nemo-run, or this machine. Imports neither torch nor Ray."""
