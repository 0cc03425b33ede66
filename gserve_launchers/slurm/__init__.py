"""The launcher `slurm`, and the batch jobs of `gserve sbatch`."""
