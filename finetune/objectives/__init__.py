"""What a step learns: noising, targets, loss weights and timesteps. Tensors only."""
