"""Silences other libraries' messages, and makes our output safe to print on any console."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings


def quiet() -> None:
    """Hides other libraries' warnings and progress bars. Errors stay visible.

    Call it before torch, diffusers and the other libraries are imported.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("bitsandbytes", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers|transformers|peft|torch")


def printable() -> None:
    """Prints characters that the console can't show (Windows' cp1252) as \\u676f, so that none ends a run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def plain(text: str) -> str:
    """Returns the text with terminal control codes (\\x1b) escaped: file names can contain them."""
    return "".join(sign if sign == "\n" or sign.isprintable() else repr(sign)[1:-1] for sign in text)


def quiet_bars() -> None:
    """Turns off transformers' progress bars for loading weights."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
