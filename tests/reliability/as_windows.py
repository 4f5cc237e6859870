"""As much of Windows as Linux can play, for a process of its own (test_portability.py starts it).

Our modules find no POSIX-only module; os.fork, os.O_DIRECTORY and SIGKILL are gone; and the file system is stubborn
as NTFS is: a folder can't be opened, a file that was opened for reading can't be flushed, and what this process has
open or mapped into memory is neither replaced, renamed nor removed. Other libraries keep their modules: they have
their own ways on Windows. Paths stay POSIX paths.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import gc
import importlib
import os
import pkgutil
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

POSIX_ONLY = ("fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty")
OURS = ("finetune", "data_tools")


def hide_modules() -> None:
    original = builtins.__import__

    def guarded(name: str, globals: Any = None, *rest: Any, **options: Any) -> Any:  # noqa: A002 - its own name
        importer = (globals or {}).get("__name__", "").partition(".")[0]
        if name.partition(".")[0] in POSIX_ONLY and importer in OURS:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return original(name, globals, *rest, **options)

    builtins.__import__ = guarded


def hide_names() -> None:
    """Those that no library on Linux needs; test_portability.py looks for the others in our source."""
    importlib.import_module("torch.distributed.elastic.timer")  # chooses SIGKILL by sys.platform
    for name in ("fork", "forkpty", "O_DIRECTORY"):
        delattr(os, name)
    for name in ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGALRM", "SIGQUIT"):
        delattr(signal, name)


def busy() -> set[str]:
    """Every file that this process has open or mapped."""
    held = {line.split(maxsplit=5)[5] for line in maps() if len(line.split(maxsplit=5)) == 6}
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            held.add(os.readlink(f"/proc/self/fd/{number}"))
    return held


def maps() -> list[str]:
    return Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()


def refuse_if_busy(path: Any) -> None:
    place = os.path.realpath(path)
    for held in busy():
        if held == place or held.startswith(place + "/"):
            raise PermissionError(errno.EACCES, "used by this process, as Windows would say", held)


def stubborn_files(work: Path) -> None:
    """Windows' rules for everything inside `work`."""
    inside = os.path.realpath(work)

    def guard(name: str, check: Callable[..., None]) -> None:
        original = getattr(os, name)

        def guarded(path: Any, *rest: Any, **options: Any) -> Any:
            if os.path.realpath(path).startswith(inside):
                check(path, *rest)
            return original(path, *rest, **options)

        setattr(os, name, guarded)

    def moving(source: Any, target: Any) -> None:
        refuse_if_busy(source)
        refuse_if_busy(target)

    def renaming(source: Any, target: Any) -> None:
        moving(source, target)
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "already there", os.fspath(target))

    def opening(path: Any, *rest: Any) -> None:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "a folder", os.fspath(path))

    for name, check in {
        "open": opening, "replace": moving, "rename": renaming, "unlink": refuse_if_busy, "remove": refuse_if_busy,
    }.items():  # fmt: skip
        guard(name, check)
    fsync = os.fsync

    def flushing(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "opened for reading alone")
        fsync(descriptor)

    os.fsync = flushing
    shutil._use_fd_functions = False  # type: ignore[attr-defined]  # as there: by paths


def import_all() -> None:
    for package in OURS:
        root = importlib.import_module(package)
        for module in pkgutil.walk_packages(root.__path__, f"{package}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)


def rules(work: Path) -> None:
    """The rules bite: what our code must not do fails here, and what it does instead works."""
    import torch
    from safetensors.torch import load_file

    from finetune.core.files import flush, load_tensors, save_tensors, write_text

    refused(ModuleNotFoundError, lambda: exec("import fcntl", {"__name__": "finetune.x"}))
    refused(PermissionError, lambda: os.close(os.open(work, os.O_RDONLY)))
    file, other = work / "a.safetensors", work / "b"
    save_tensors(file, {"x": torch.ones(1000)})
    with file.open("rb") as opened:
        refused(OSError, lambda: os.fsync(opened.fileno()))
        refused(PermissionError, lambda: save_tensors(file, {"x": torch.zeros(1000)}))
    write_text(other, "new")
    refused(FileExistsError, lambda: other.rename(file))
    mapped = load_file(file)
    refused(PermissionError, lambda: other.replace(file))
    refused(PermissionError, lambda: file.unlink())
    refused(PermissionError, lambda: shutil.rmtree(work))
    del mapped
    held = load_tensors(file)
    save_tensors(file, {"x": torch.zeros(1000)})
    assert bool((held["x"] == 1).all())
    flush(file)
    flush(work)
    write_text(other, "new")
    reader = other.open(encoding="utf-8")
    threading.Timer(0.1, reader.close).start()
    write_text(other, "newer")  # waits for the reader
    assert other.read_text(encoding="utf-8") == "newer"


def refused(kind: type[BaseException], act: Callable[[], object]) -> None:
    try:
        act()
    except kind:
        return
    raise AssertionError(f"no {kind.__name__}")


def first_steps(work: Path, photos: Path) -> None:
    """The demo with few steps, longer, exported again, drawn from, converted over itself; then a whole model."""
    from finetune.cli.main import run

    def finetune(*arguments: object) -> None:
        code, message = run([str(argument) for argument in arguments])
        assert code == 0, f"{arguments} ended with {code}: {message}"

    folder = work / "run"
    small = [
        f"data.photos={photos}", f"run.dir={folder}", "prior.count=2", "prior.others=null",
        "prior.steps=1", "run.checkpoint_every=1",
        "run.keep=1", "sample.steps=1", "sample.count=1", "sample.every=1", "run.ema=0.9",
    ]  # fmt: skip
    finetune("train", "demo", *small, "run.steps=2", "--dry-run")
    finetune("train", "demo", *small, "run.steps=2")
    longer = ("run.steps=3", "optim.schedule_steps=2")
    finetune("train", "demo", *small, *longer)  # reads the checkpoint, then replaces it and the adapter
    finetune("resume", folder)  # nothing is left to do but the page
    finetune("export", folder, "--to", "kohya", "--to", "diffusers", "--to", "peft")
    finetune("export", folder, "--to", "kohya", "--to", "diffusers", "--to", "peft")
    finetune("report", folder)
    finetune("sample", folder, "-p", "a mug", "--count", 1, "--steps", 1, "--out", work / "pictures")
    file = folder / "exports" / "demo.safetensors"
    finetune("convert", file, "--to", "kohya", "--out", file.with_suffix(""), "--dtype", "fp32", "--force")
    finetune("convert", file, "--to", "kohya", "--out", file.with_suffix(""), "--dtype", "fp32", "--force")
    finetune("train", "demo-full", *small[:1], f"run.dir={work / 'whole'}", *small[2:], "run.steps=1")
    finetune("export", work / "whole", "--to", "folder", "--to", "checkpoint")


def main() -> None:
    what, work, *rest = sys.argv[1:]
    hide_modules()
    hide_names()
    import_all()
    gc.freeze()  # as in conftest.py
    stubborn_files(Path(work))
    if what == "rules":
        rules(Path(work))
    if what == "first-steps":
        first_steps(Path(work), Path(rest[0]))
    print("done")


if __name__ == "__main__":
    main()
