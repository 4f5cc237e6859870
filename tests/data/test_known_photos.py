"""A photo is decoded once, and again where its file changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from finetune.core.errors import BadInput
from finetune.core.files import cache_dir
from finetune.data import decoding, known_photos, photos
from finetune.data.known_photos import forget_scans
from finetune.data.photos import Photo, scan, scan_lenient


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read, in a cache of the test, where files may be as young as they are."""
    names: list[str] = []
    content = decoding.image_bytes

    def noted(file: Path) -> bytes:
        names.append(file.name)
        return content(file)

    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    for module in (photos, decoding):
        monkeypatch.setattr(module, "image_bytes", noted)
    monkeypatch.setattr(known_photos, "YOUNG", 0.0)
    return names


def drawn(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(4):
        Image.new("RGB", (40, 20 + number), (60 * number, 0, 0)).save(folder / f"{number}.png")
    return folder


def whole(found: list[Photo]) -> list[tuple[object, ...]]:
    return [(photo.path, photo.size, photo.digest, photo.recoloured) for photo in found]


def test_a_second_scan_opens_only_what_changed(tmp_path: Path, opened: list[str]) -> None:
    folder = drawn(tmp_path / "photos")
    first = scan(folder)
    assert opened == ["0.png", "1.png", "2.png", "3.png"]
    opened.clear()
    assert whole(scan(folder)) == whole(first) == whole(scan_lenient(folder, workers=3).photos)
    assert opened == []
    Image.new("RGB", (40, 22), "blue").save(folder / "2.png")
    os.replace(folder / "3.png", folder / "9.png")
    changed = scan_lenient(folder, workers=3).photos
    assert sorted(opened) == ["2.png", "9.png"]
    forget_scans()
    assert whole(scan(folder)) == whole(changed)  # as if nothing had been known
    assert changed[2].digest != first[2].digest


def test_a_file_that_has_just_changed_is_not_known(
    tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could change again within one tick of the file system's clock."""
    monkeypatch.setattr(known_photos, "YOUNG", 60.0)
    folder = drawn(tmp_path / "photos")
    scan(folder)
    scan(folder)
    assert len(opened) == 8


def test_bad_files_are_told_again_and_a_damaged_record_is_no_harm(tmp_path: Path, opened: list[str]) -> None:
    folder = drawn(tmp_path / "photos")
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:-30])
    for _ in range(2):
        with pytest.raises(BadInput, match=r"1 of 4 files can't be used: 1\.png"):
            scan(folder)
    assert opened == ["0.png", "1.png", "2.png", "3.png", "1.png"]
    (record,) = (cache_dir() / "scans").iterdir()
    for content in ("{", '{"made_with": 1}', record.read_text().replace(" 40 ", " -4 ")):
        record.write_text(content, encoding="utf-8", newline="\n")
        opened.clear()
        assert len(scan_lenient(folder).photos) == 3
        assert len(opened) == 4
