"""The training loop, its schedule, its metrics and its checkpoints."""
