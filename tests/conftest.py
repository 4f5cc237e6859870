"""Small real bases for every test, made once, and a cache of our own."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers on two cores; read when torch is imported
os.environ.setdefault("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", ""))

from finetune.core.logging import quiet, quiet_bars

quiet()

import numpy as np
import pytest
import torch
import typer.main
from PIL import Image, ImageOps

from finetune.families.registry import FAMILIES
from finetune.families.source import load_family
from finetune.testing.tiny import write_tiny

SHARED = Path(__file__).parents[1] / ".." / "shared"


def pytest_collection_finish() -> None:
    """Ours collect garbage when they let go of a model: it takes 0.2 seconds to look through all imported modules."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _calm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    torch.set_num_threads(1)
    quiet_bars()
    os.environ["FINETUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", cache(typer.main.get_command))  # else built anew for 800 commands
        patch.setattr(os, "fsync", os.fstat)  # no test cuts the power; a run would wait for the disk forty times
        yield


@pytest.fixture(scope="session")
def tiny_bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family name -> a small random base of it."""
    root = tmp_path_factory.mktemp("bases")
    for name in FAMILIES:
        write_tiny(name, root / name)
    return {name: root / name for name in FAMILIES}


@pytest.fixture(scope="session")
def wide_bases(tiny_bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """(family, extra inputs) -> a small base that has them, with weights of its own for them."""
    root = tmp_path_factory.mktemp("wide")
    kinds = [(name, kind) for name, family in FAMILIES.items() for kind in getattr(family, "pipelines", {}) if kind]
    for name, kind in kinds:
        family = load_family(str(tiny_bases[name]))
        family.widen(kind)
        with torch.no_grad():
            family.parts["denoiser"].conv_in.weight.normal_(generator=torch.Generator().manual_seed(3))
        family.drawing.pipeline().save_pretrained(root / f"{name}-{kind}")
    return {(name, kind): root / f"{name}-{kind}" for name, kind in kinds}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos")


def write_photos(folder: Path) -> Path:
    """A new folder with three different 48x40 photos."""
    folder.mkdir()
    for index, colour in enumerate(((200, 30, 30), (30, 200, 30), (30, 30, 200))):
        image = Image.new("RGB", (48, 40), colour)
        image.paste((250, 250, 250), (8 * index, 8, 8 * index + 12, 24))
        image.save(folder / f"{index}.png")
    return folder


def write_companions(folder: Path) -> Path:
    """A depth map and an image before an edit beside each photo of `write_photos`."""
    for file in sorted(folder.glob("?.png")):
        depth = np.add.outer(np.arange(40), np.arange(48)).astype(np.uint8)
        Image.fromarray(depth).save(folder / f"{file.stem}.depth.png")
        ImageOps.invert(Image.open(file)).save(folder / f"{file.stem}.before.png")
    return folder
