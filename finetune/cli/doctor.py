"""`finetune doctor`: checks what works on this machine, and says how to fix what does not."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.core.errors import BadInput
from finetune.core.files import cache_dir

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

    from finetune.optim.base import Optimiser

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "safetensors")
NEEDED_GB = 10


@dataclass(frozen=True)
class Finding:
    """One line of the result.

    `ok` is None for information only, True where it works, False where something is wrong. `advice` says what to do.
    """

    name: str
    value: str
    ok: bool | None = None
    advice: str = ""


def examine() -> list[Finding]:
    """Runs every check and returns the findings in order. No check changes anything."""
    return [*_versions(), *_devices(), *_precisions(), *_optimisers(), _hub(), _space(), _writable()]


def _versions() -> list[Finding]:
    findings = [Finding("python", platform.python_version())]
    bounds = _bounds()
    for name in PACKAGES:
        try:
            found = version(name)
        except PackageNotFoundError:
            findings.append(
                Finding(name, "missing", False, "install it: pip install -c constraints.txt finetune-diffusion")
            )
            continue
        bound = bounds.get(name)
        inside = bound is None or bound.contains(found, prereleases=True)
        advice = "" if inside else f"tested versions are {bound}: pip install '{name}{bound}'"
        findings.append(Finding(name, found, inside, advice))
    return findings


def _bounds() -> dict[str, SpecifierSet]:
    from packaging.requirements import Requirement

    try:
        stated = [Requirement(text) for text in requires("finetune-diffusion") or []]
    except PackageNotFoundError:
        return {}
    return {item.name: item.specifier for item in stated if item.marker is None}


def _devices() -> list[Finding]:
    import torch

    findings = [Finding("CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads used")]
    for index in range(torch.cuda.device_count()):
        findings.append(_gpu(index))
    if torch.backends.mps.is_available():
        size = torch.mps.recommended_max_memory() / 2**30
        findings.append(Finding("GPU", f"Apple (mps), {size:.0f} GiB of memory recommended for use", True))
    elif not torch.cuda.is_available():
        findings.append(Finding("GPU", "none", None, "the tiny base trains on a CPU; Stable Diffusion needs a GPU"))
    return findings


def _gpu(index: int) -> Finding:
    import torch

    from finetune.core.devices import native_bf16

    about = torch.cuda.get_device_properties(index)
    said = f"{about.name}, {about.total_memory / 2**30:.0f} GiB"
    if native_bf16(index):
        return Finding(f"GPU {index}", f"{said}, bf16", True)
    return Finding(
        f"GPU {index}", f"{said}, bf16 is only emulated", True, "set run.precision=fp16, which is fast on this GPU"
    )


def _precisions() -> list[Finding]:
    import torch

    from finetune.core.devices import best_device

    device = best_device()

    def product(dtype: torch.dtype) -> None:
        value = torch.ones(8, 8, device=device, dtype=dtype)
        assert float((value @ value)[0, 0]) == 8

    findings = [
        _try("bf16", lambda: product(torch.bfloat16), "use run.precision=fp32"),
        _try("fp32", lambda: product(torch.float32), "install torch again"),
    ]
    if device.type == "cuda":
        return [*findings, _try("fp16", lambda: product(torch.float16), "use run.precision=fp32")]
    return [*findings, Finding("fp16", "not available without CUDA", None, "use run.precision=fp32 or bf16")]


def _optimisers() -> list[Finding]:
    """Every registered optimiser, including those from other packages."""
    from finetune.optim.registry import OPTIMISERS

    return [_optimiser(f"optim.kind {kind}", entry(kind=kind)) for kind, entry in OPTIMISERS.items()]


def _optimiser(name: str, optimiser: Optimiser) -> Finding:
    """Tries one step. An optimiser that needs something this machine lacks is reported, but is not an error."""
    from finetune.core.devices import best_device

    try:
        moved = optimiser.try_on(best_device())
    except BadInput as error:
        return Finding(name, "not on this machine", None, str(error))
    except (RuntimeError, ImportError, OSError, AttributeError) as error:
        return Finding(name, _first_line(error), False, "use optim.kind=adamw, or install its package again")
    if not moved > 0:  # also catches NaN
        return Finding(name, "takes a step in the wrong direction", False, "use optim.kind=adamw")
    return Finding(name, "works", True)


def _try(name: str, check: Callable[[], None], advice: str) -> Finding:
    try:
        check()
    except (RuntimeError, AssertionError, ImportError, OSError, AttributeError) as error:
        return Finding(name, _first_line(error), False, advice)
    return Finding(name, "works", True)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else "a wrong result"


def _hub() -> Finding:
    import urllib.error
    import urllib.request

    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return Finding("hub", "switched off (HF_HUB_OFFLINE=1)", None)
    try:
        urllib.request.urlopen("https://huggingface.co/api/models?limit=1", timeout=3).close()
    except (OSError, urllib.error.URLError):
        return Finding(
            "hub", "out of reach", None, "use base=tiny or a local folder, or check the connection or proxy"
        )
    return Finding("hub", "reachable", True)


def _space() -> Finding:
    folder = cache_dir()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 2**30
    enough = free >= NEEDED_GB
    advice = (
        "" if enough else f"free some space, or set FINETUNE_CACHE to another disk (about {NEEDED_GB} GiB are needed)"
    )
    return Finding("free space", f"{free:.0f} GiB at {cache_dir()}", enough, advice)


def _writable() -> Finding:
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache_dir()), tempfile.TemporaryFile(dir=Path.cwd()):
            pass
    except OSError as error:
        return Finding("writing", str(error), False, "run in a folder that you may write to, or set FINETUNE_CACHE")
    return Finding("writing", "works, here and in the cache", True)
