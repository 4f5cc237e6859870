"""Base models: how each family is loaded, encodes, predicts and draws. One file for each family."""
