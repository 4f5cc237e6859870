"""Silences other libraries' messages, and makes our output safe to print on any console."""

from __future__ import annotations

import importlib
import io
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

# their loggers: what they warn of is for whoever writes a loop with them, and nothing that a person here could change
LOGGERS = ("accelerate", "diffusers", "peft", "torchao", "transformers")
BITSANDBYTES = ("bitsandbytes", "bitsandbytes.backends.cpu.ops")  # it reports an optional package as an error
MODULES = r"(accelerate|bitsandbytes|diffusers|peft|transformers)(\.|$)"
_LOCK = threading.Lock()
_INSIDE: list[ExitStack] = []  # one for each thread that is inside `quieted`; the first holds what is put back


@contextmanager
def quieted() -> Iterator[None]:
    """Inside the block, other libraries' warnings and loading bars are hidden; errors are not. For use in somebody
    else's process: afterwards all is as it was. A library that the application told to say more (INFO, DEBUG) does.

    Several threads may be inside at once: the last that leaves puts everything back.
    """
    with _LOCK:
        if not _INSIDE:
            _INSIDE.append(_hush())
        _INSIDE.append(_INSIDE[0])
    try:
        yield
    finally:
        with _LOCK:
            restore = _INSIDE.pop()
            if len(_INSIDE) == 1:
                _INSIDE.clear()
                restore.close()


def _hush() -> ExitStack:
    """Hides it all. To close what is returned puts everything back."""
    restore = ExitStack()
    for name in ("transformers", "diffusers"):
        library = importlib.import_module(f"{name}.utils.logging")
        library.get_verbosity()  # the first use sets the logger's level
        restore.callback(setattr, library, "_tqdm_active", library.is_progress_bar_enabled())
        # `disable_progress_bar` would turn off the hub's bars of downloads too
        setattr(library, "_tqdm_active", False)  # noqa: B010
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if logger.level in (logging.NOTSET, logging.WARNING):
            restore.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
    restore.enter_context(quiet_import())
    for category, module in ((Warning, MODULES), (FutureWarning, r"torch(\.|$)")):
        _ignore(category, module, restore)
    return restore


@contextmanager
def quiet_import() -> Iterator[None]:
    """Inside the block, libraries can be imported without a word of bitsandbytes about what is not installed."""
    before = {name: logging.getLogger(name).level for name in BITSANDBYTES}
    for name in BITSANDBYTES:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def _ignore(category: type[Warning], module: str, restore: ExitStack) -> None:
    """Not `warnings.catch_warnings`: it would undo what other threads change meanwhile."""
    before = list(warnings.filters)
    warnings.filterwarnings("ignore", category=category, module=module)
    added = warnings.filters[0]
    if added in before:
        return

    def remove() -> None:
        with suppress(ValueError):  # the application has replaced the filters
            warnings.filters.remove(added)  # type: ignore[attr-defined]

    restore.callback(remove)


def quiet() -> None:
    """Hides other libraries' warnings and progress bars, in a process of our own. Errors stay visible.

    Call it before torch, diffusers and the other libraries are imported.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in BITSANDBYTES:
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
