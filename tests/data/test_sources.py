"""Where photos come from: a folder, a zip, and a source from outside: the same photos give the same run."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_train import LORA, settings

from finetune import resume, train
from finetune.config.load import parse_recipe
from finetune.config.recipe import Recipe
from finetune.core.errors import BadInput, Stopped
from finetune.core.events import Event, StepDone
from finetune.core.files import cache_dir
from finetune.core.signals import Stop
from finetune.data.photos import image_files
from finetune.data.settings import Data
from finetune.data.sources.base import Packed
from finetune.data.sources.registry import SOURCES, open_source
from finetune.jobs.subjects import scan_subjects


class Hexed(Packed):
    """One file a line: its name and its bytes in hex."""

    name = "hexed"

    @classmethod
    def matches(cls, path: Path) -> bool:
        return path.suffix == ".hexed"

    def files(self, path: Path) -> Iterable[tuple[str, bytes]]:
        rows = (line.split(" ") for line in path.read_text().splitlines())
        return [(name, bytes.fromhex(content)) for name, content in rows]


@pytest.fixture
def captioned(photos: Path) -> Path:
    (photos / "0.txt").write_text("a {token} {noun} on a table")
    (photos / "metadata.jsonl").write_text(json.dumps({"file_name": "1.png", "text": "the {token} {noun}"}))
    return photos


@pytest.fixture
def _with_hexed() -> Iterator[None]:
    SOURCES.register(Hexed)
    try:
        yield
    finally:
        del SOURCES._found[Hexed.name]


def zipped(folder: Path, file: Path, inside: str = "") -> Path:
    """In reverse order: the order of the photos is that of their names."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as held:
        for each in sorted(folder.iterdir(), reverse=True):
            held.write(each, f"{inside}{each.name}")
        held.writestr(f"__MACOSX/{inside}._0.png", b"x")
        held.writestr(f"{inside}.DS_Store", b"x")
    return file


def hexed(folder: Path, file: Path) -> Path:
    file.write_text("\n".join(f"{each.name} {each.read_bytes().hex()}" for each in sorted(folder.iterdir())))
    return file


def test_ours_are_all_there() -> None:
    assert list(SOURCES) == ["folder", "hub", "imagefolder", "kohya", "parquet", "webdataset", "zip"]


def test_a_folder_is_used_where_it_is(captioned: Path) -> None:
    assert open_source(captioned).folder == captioned


@pytest.mark.parametrize("inside", ["", "My photos/"])
def test_a_zip_gives_the_folders_files(inside: str, captioned: Path, tmp_path: Path) -> None:
    opened = open_source(zipped(captioned, tmp_path / "photos.zip", inside))
    assert opened.unused == ""
    assert {file.name: file.read_bytes() for file in opened.folder.iterdir()} == {
        file.name: file.read_bytes() for file in captioned.iterdir()
    }
    (scanned,) = scan_subjects(Data(photos=tmp_path / "photos.zip", class_noun="mug"))
    (plain,) = scan_subjects(Data(photos=captioned, class_noun="mug"))
    assert [photo.digest for photo in scanned.photos] == [photo.digest for photo in plain.photos]


def test_what_is_changed_in_the_cache_is_put_right(captioned: Path, tmp_path: Path) -> None:
    file = zipped(captioned, tmp_path / "photos.zip")
    folder = open_source(file).folder
    shutil.copy(folder / "0.png", folder / "1.png")
    open_source(file)
    assert (folder / "1.png").read_bytes() == (captioned / "1.png").read_bytes()


@pytest.mark.usefixtures("_with_hexed")
@pytest.mark.slow
def test_the_run_is_the_folders_and_goes_on_without_the_cache(
    tiny_bases: dict[str, Path], captioned: Path, tmp_path: Path
) -> None:
    """Bit for bit; the zip's run is stopped after two steps, and the unpacked photos are gone when it goes on."""
    packed = {"zip": zipped(captioned, tmp_path / "p.zip"), "hexed": hexed(captioned, tmp_path / "p.hexed")}
    short = {"steps": 4, "batch_size": 2, "checkpoint_every": 2, "precision": "fp32"}

    def made(photos: Path) -> Recipe:
        return parse_recipe(settings(tiny_bases["sd1"], photos, LORA, run=short, prior={"kind": "none"}))

    stop = Stop()

    def after_two(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 2:
            stop.request()

    train(made(captioned), tmp_path / "folder")
    train(made(packed["hexed"]), tmp_path / "hexed")
    with pytest.raises(Stopped):
        train(made(packed["zip"]), tmp_path / "zip", events=after_two, stop=stop)
    shutil.rmtree(cache_dir() / "photos")
    resume(tmp_path / "zip")
    wanted, *others = (
        load_file(tmp_path / name / "adapter" / "trained.safetensors") for name in ("folder", "hexed", "zip")
    )
    for found in others:
        assert wanted.keys() == found.keys()
        assert all(bool((wanted[name] == found[name]).all()) for name in wanted)
    texts = [json.loads((tmp_path / name / "run.json").read_text())["captions"] for name in ("folder", "zip")]
    assert texts[0] == texts[1]


def test_what_is_no_photo_is_named(captioned: Path, tmp_path: Path) -> None:
    (captioned / "notes.pdf").write_bytes(b"x")
    (captioned / "film.mp4").write_bytes(b"x")
    (scanned,) = scan_subjects(Data(photos=zipped(captioned, tmp_path / "photos.zip"), class_noun="mug"))
    assert scanned.left_out == "not used from photos.zip: film.mp4, notes.pdf"


def damaged(file: Path) -> None:
    """A byte inside the first picture's data."""
    content = bytearray(file.read_bytes())
    content[content.index(b"2.png") + 40] ^= 0xFF
    file.write_bytes(content)


def refused(file: Path, *words: str) -> None:
    with pytest.raises(BadInput) as raised:
        scan_subjects(Data(photos=file, class_noun="mug"))
    assert all(word in str(raised.value) for word in words), raised.value


def test_bad_zips_are_refused_by_name(captioned: Path, tmp_path: Path) -> None:
    (tmp_path / "text.zip").write_text("no zip at all")
    refused(tmp_path / "text.zip", "text.zip is not a complete zip file")
    damaged(zipped(captioned, tmp_path / "damaged.zip"))
    refused(tmp_path / "damaged.zip", "2.png in", "damaged.zip", "is damaged")
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as held:
        held.write(captioned / "0.png", "a/0.png")
        held.write(captioned / "1.png", "b/1.png")
    refused(tmp_path / "two.zip", "several folders (a, b)")
    with zipfile.ZipFile(tmp_path / "none.zip", "w") as held:
        held.writestr("notes.pdf", b"x")
    refused(tmp_path / "none.zip", "holds no images", "none.zip")
    with zipfile.ZipFile(tmp_path / "same.zip", "w") as held:
        held.write(captioned / "0.png", "a.png")
        held.write(captioned / "1.png", "A.png")
    refused(tmp_path / "same.zip", "two files 'A.png'")
    (captioned / "2.png").write_bytes(b"no picture")
    refused(zipped(captioned, tmp_path / "bad.zip"), "bad.zip", "2.png (not an image")


def test_a_path_in_a_zip_can_not_leave_the_cache(captioned: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as held:
        held.write(captioned / "0.png", "../../../evil.png")
    refused(tmp_path / "evil.zip", "holds no images")
    with zipfile.ZipFile(tmp_path / "odd.zip", "w") as held:
        held.write(captioned / "0.png", "/etc/odd.png")
    opened = open_source(tmp_path / "odd.zip").folder
    assert image_files(opened) == [opened / "odd.png"]
    assert opened.is_relative_to(cache_dir())
