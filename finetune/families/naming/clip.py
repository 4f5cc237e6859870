"""The two layouts of CLIP's module paths.

transformers 5.6 removed the `text_model.` wrapper from CLIPTextModel but not from CLIPTextModelWithProjection. Files
for other programs always have it, so all readers and writers use these two functions.
"""

from __future__ import annotations

WRAPPER = "text_model."


def strip_text_model(path: str) -> str:
    """A module path inside a text encoder, without the wrapper."""
    return path.removeprefix(WRAPPER)


def add_text_model(path: str) -> str:
    """The path with the wrapper, for files of other programs."""
    return path if path.startswith(WRAPPER) else WRAPPER + path
