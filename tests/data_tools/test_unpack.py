"""Data sets become photo folders: the stored bytes, captions, and sentences for what is not there."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import datasets
import pytest

from data_tools.__main__ import main
from finetune.data.captions import caption_rows
from finetune.data.leftovers import MANIFEST
from finetune.data.photos import scan


@pytest.fixture
def parquet(photos: Path, tmp_path: Path) -> Path:
    files = sorted(photos.iterdir())
    rows = datasets.Dataset.from_dict({"image": [str(file) for file in files], "text": ["a", "", "c, d"]})
    file = tmp_path / "set.parquet"
    rows.cast_column("image", datasets.Image()).to_parquet(str(file))
    return file


def test_bytes_and_captions_come_out_as_they_went_in(parquet: Path, photos: Path, tmp_path: Path) -> None:
    assert main(["unpack", str(parquet), str(tmp_path / "out")]) == 0
    names = [f"0000{number}.png" for number in range(3)]
    assert [photo.path.name for photo in scan(tmp_path / "out")] == names
    for name, file in zip(names, sorted(photos.iterdir()), strict=True):
        assert (tmp_path / "out" / name).read_bytes() == file.read_bytes()
    assert caption_rows(tmp_path / "out") == {names[0]: "a", names[2]: "c, d"}


def test_unpacking_leaves_a_manifest_and_can_be_taken_back(
    parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, out = parquet.read_bytes(), tmp_path / "out"
    assert main(["unpack", str(parquet), str(out), "--dry-run"]) == 0
    assert "would hold 3 images" in capsys.readouterr().out
    assert not out.exists()
    assert main(["unpack", str(parquet), str(out)]) == 0
    values = json.loads((out / MANIFEST).read_text())
    written = {name: digest for row in values["photos"] for name, digest in row["files"].items()} | values["files"]
    there = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in out.iterdir()}
    del there[MANIFEST]
    assert written == there
    assert (values["command"], values["photos"][1]["source"]) == ("unpack", "row 1")
    assert main(["unpack", "--undo", str(out)]) == 0
    assert not out.exists()
    assert parquet.read_bytes() == before


def test_an_image_folder_with_a_limit(photos: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"file_name": f"{number}.png", "text": f"nr {number}"}) for number in range(3)]
    (photos / "metadata.jsonl").write_text("\n".join(lines))
    assert main(["unpack", str(photos), str(tmp_path / "out"), "--limit", "2"]) == 0
    assert set(caption_rows(tmp_path / "out").values()) == {"nr 0", "nr 1"}


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["/nowhere", "out"], "/nowhere"),
        (["{set}", "{here}"], "already exists"),
        (["{set}", "out", "--image", "x"], "'x'"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], word: str, parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["unpack", *(text.format(set=parquet, here=tmp_path) for text in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert word in error
    assert not (tmp_path / "out").exists()


def test_rows_without_a_whole_image_are_named_and_left_out(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = sorted(photos.iterdir())[0].read_bytes()
    contents = [whole, whole[: len(whole) // 2], b"no image", None]
    rows = [{"bytes": content, "path": None} if content else None for content in contents]
    file, out = tmp_path / "set.parquet", tmp_path / "out"
    data = datasets.Dataset.from_dict({"image": rows, "text": list("abcd")})
    data.cast_column("image", datasets.Image()).to_parquet(str(file))
    told = {"row 1": "truncated", "row 2": "not an image, or its beginning is damaged", "row 3": "no image"}
    assert main(["unpack", str(file), str(out), "--dry-run"]) == 0
    assert "would hold 1 images" in capsys.readouterr().out
    assert main(["unpack", str(file), str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "left out" in line] == [f"{row}: left out ({why})" for row, why in told.items()]
    assert caption_rows(out) == {"00000.png": "a"}
    steps = json.loads((out / MANIFEST).read_text())["photos"]
    assert {step["source"]: step["why"] for step in steps if step["action"] == "left out"} == told
    data.select([1, 2, 3]).cast_column("image", datasets.Image()).to_parquet(str(file))
    assert main(["unpack", str(file), str(tmp_path / "none")]) == 2
    assert "no row of" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
