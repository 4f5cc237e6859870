"""The two layouts of CLIP's module paths.

transformers 5.6 took the `text_model.` wrapper off CLIPTextModel but left it on CLIPTextModelWithProjection. Files
for other programs always have it, so every reader and writer passes through these two functions.
"""

from __future__ import annotations

WRAPPER = "text_model."


def strip_text_model(path: str) -> str:
    """A module path inside a text encoder, without the wrapper."""
    return path.removeprefix(WRAPPER)


def add_text_model(path: str) -> str:
    """The path as files for other programs have it."""
    return path if path.startswith(WRAPPER) else WRAPPER + path
