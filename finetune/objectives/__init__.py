"""Training objectives: timesteps, noise, targets and loss weights. They work on tensors and need no model."""
