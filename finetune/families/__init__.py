"""Base models: how each family is loaded, encodes prompts, predicts and draws images. One file for each family."""
