"""One process per file: wiring and lifecycle, nothing else."""
