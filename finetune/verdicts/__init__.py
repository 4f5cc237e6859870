"""Verdicts on a run from the model's own predictions: what it learned, and what it changed that it should not."""
