"""Torch modules of methods. They are imported only when they are built, so that settings do not import torch."""
