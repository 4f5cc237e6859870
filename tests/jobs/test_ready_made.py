"""Images of everything else that came with the tiny base are taken if they are what would be drawn."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
from PIL import Image

from finetune.config.load import load_recipe
from finetune.families.source import load_family, resolve_base
from finetune.jobs import class_sets
from finetune.jobs.class_sets import OtherSet, class_images
from finetune.jobs.demo import demo_images
from finetune.jobs.prepare import other_set, prepare
from finetune.jobs.ready_made import MANIFEST, READY_MADE, pack_images, unpack_images


def demo_set(*overrides: str) -> OtherSet:
    found = other_set(
        prepare(load_recipe("demo", [f"data.photos={demo_images()}", "data.class_noun=mug", *overrides]))
    )
    assert found is not None
    return found


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """The numbers of images that are drawn; grey ones stand for them."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    numbers: list[int] = []

    def draw(family: object, prompts: list[str], sampling: object, seeds: list[int]) -> list[Image.Image]:
        numbers.append(len(prompts))
        return [Image.new("RGB", (8, 8))] * len(prompts)

    monkeypatch.setattr(class_sets, "draw", draw)
    return numbers


def test_a_first_run_on_the_tiny_base_draws_none_of_them(drawn: list[int]) -> None:
    wanted = demo_set()
    photos = class_images(load_family("tiny"), wanted)
    assert len(photos) == 256
    assert drawn == []
    with ZipFile(resolve_base("tiny") / READY_MADE) as opened:
        assert photos[200].path.read_bytes() == opened.read("00200.png")
    kept = json.loads((wanted.folder / MANIFEST).read_text())["pictures"]
    assert kept["00200.png"]["sha256"] == photos[200].digest
    assert class_images(load_family("tiny"), wanted) == photos


@pytest.mark.parametrize(
    "override", ["prior.others={guidance: 3.0, steps: 4}", "prior.others={guidance: 3.0, steps: 12, empty: 0.5}"]
)
def test_other_settings_are_drawn(override: str, drawn: list[int]) -> None:
    class_images(load_family("tiny"), demo_set(override))
    assert sum(drawn) == 256


def test_what_is_damaged_is_drawn(drawn: list[int], tmp_path: Path) -> None:
    """An image with other bytes than the manifest says, one that is missing, a file that is no archive."""
    source = resolve_base("tiny") / READY_MADE
    with ZipFile(source) as opened:
        opened.extractall(tmp_path / "set")
    names = [f"{number:05d}.png" for number in range(16)]
    (tmp_path / "set" / names[3]).write_bytes(b"another")
    pack_images(tmp_path / "set", tmp_path / "one.zip", names[:8])
    (tmp_path / "set" / MANIFEST).write_text("[]")
    pack_images(tmp_path / "set", tmp_path / "two.zip", names)
    (tmp_path / "three.zip").write_bytes(source.read_bytes()[:100_000])
    wanted = demo_set()
    for file, found in (("one", set(names[:8]) - {names[3]}), ("two", set()), ("three", set()), ("none", set())):
        folder = tmp_path / f"from-{file}"
        unpack_images(tmp_path / f"{file}.zip", folder, wanted.made_of, names)
        assert {path.name for path in folder.glob("*")} == found, file
        shutil.rmtree(folder, ignore_errors=True)
    class_images(
        load_family("tiny"),
        replace(wanted, ready_made=tmp_path / "one.zip", prior=wanted.prior.model_copy(update={"count": 16})),
    )
    assert drawn == [8, 8]


def test_no_damage_of_the_file_ends_a_run(tmp_path: Path) -> None:
    """Any bit of its headers: the images are drawn, or read as they were."""
    wanted, names = demo_set(), [f"{number:05d}.png" for number in range(2)]
    with ZipFile(resolve_base("tiny") / READY_MADE) as opened:
        opened.extractall(tmp_path / "set", [MANIFEST, *names])
    pack_images(tmp_path / "set", tmp_path / "whole.zip", names)
    content, sound = (
        (tmp_path / "whole.zip").read_bytes(),
        {name: (tmp_path / "set" / name).read_bytes() for name in names},
    )
    places = [*range(30), *range(len(content) - 200, len(content))]
    for number, place in enumerate(places):
        damaged = bytearray(content)
        damaged[place] ^= 1 << number % 8
        (tmp_path / "damaged.zip").write_bytes(damaged)
        unpack_images(tmp_path / "damaged.zip", tmp_path / "out", wanted.made_of, names)
        assert all(file.read_bytes() == sound[file.name] for file in (tmp_path / "out").glob("*"))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_what_was_drawn_here_once_is_drawn_again(drawn: list[int]) -> None:
    """Its manifest may hold other last bits than the file has: each rank, and the next start, would refuse them."""
    wanted = demo_set()
    class_images(load_family("tiny"), wanted)
    manifest = json.loads((wanted.folder / MANIFEST).read_text())
    manifest["pictures"]["00003.png"]["sha256"] = "0" * 64
    (wanted.folder / MANIFEST).write_text(json.dumps(manifest))
    (wanted.folder / "00003.png").unlink()
    assert len(class_images(load_family("tiny"), wanted)) == 256
    assert drawn == [8]


@pytest.mark.slow
def test_they_are_what_the_base_draws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A chunk of them, to one grey level: other processors round differently."""
    wanted = demo_set()
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    drawn = replace(wanted, ready_made=None, prior=wanted.prior.model_copy(update={"count": 8}))
    photos = class_images(load_family("tiny"), drawn)
    with ZipFile(resolve_base("tiny") / READY_MADE) as opened:
        opened.extractall(tmp_path / "set")
    for photo in photos:
        own, shipped = (
            np.asarray(Image.open(file), dtype=int) for file in (photo.path, tmp_path / "set" / photo.path.name)
        )
        assert (abs(own - shipped) > 1).mean() <= 0.001
