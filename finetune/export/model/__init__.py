"""Whole models: a diffusers folder, a single file."""
