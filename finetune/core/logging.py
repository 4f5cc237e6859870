"""The one place where other libraries' chatter is silenced: what a person sees is ours, on any console."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings


def quiet() -> None:
    """Call before torch, diffusers and the rest are imported. Errors still come through."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("bitsandbytes", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers|transformers|peft|torch")


def printable() -> None:
    """What a console has no character for (Windows' cp1252) shows as \\u676f: no run ends for a prompt."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def plain(text: str) -> str:
    """Text without what a terminal would obey: a file's names may hold its commands (\\x1b)."""
    return "".join(sign if sign == "\n" or sign.isprintable() else repr(sign)[1:-1] for sign in text)


def quiet_bars() -> None:
    """Switches off transformers' weight-loading bars."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
