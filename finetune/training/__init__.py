"""The training loop and its components: the step, checkpoints, EMA, regularizers."""
