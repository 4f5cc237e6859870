"""Torch modules of methods: imported where they are made, so that settings need no torch."""
