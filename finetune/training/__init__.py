"""The training loop and what it works with: the step, checkpoints, EMA, regularizers."""
