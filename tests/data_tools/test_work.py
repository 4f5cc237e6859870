"""The frame of the commands that write: the source stays, nothing is half written, everything can be taken back."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import write_companions
from PIL import Image

from data_tools import work
from data_tools.__main__ import main
from data_tools.dedupe import dedupe
from data_tools.photo_set import read_set
from data_tools.undo import undo
from finetune.cli.main import run as finetune
from finetune.core.errors import BadInput
from finetune.data.captions import caption_rows
from finetune.data.leftovers import MANIFEST

COMMANDS = {
    "dedupe": [], "split": ["--hold-out", "1"], "resize": ["--resolution", "24"], "tags": ["--drop", "red"],
    "sheet": [], "crop": ["--resolution", "24"], "mask": [],
}  # fmt: skip


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file's bytes and time, and the folders' times."""
    files = [folder, *sorted(folder.rglob("*"))]
    return {str(file): (file.read_bytes() if file.is_file() else b"", file.stat().st_mtime_ns) for file in files}


@pytest.fixture
def drawings(tmp_path: Path) -> Path:
    """Four different photos with captions, masks of both kinds, depth maps, and a file that nobody can read."""
    folder = tmp_path / "drawings"
    folder.mkdir()
    for number in range(4):
        noise = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((96, 72), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"sks, red, number {number}\n")
    Image.new("L", (96, 72), 255).save(folder / "0.mask.png")
    (folder / "masks").mkdir()
    Image.new("L", (96, 72), 200).save(folder / "masks" / "1.png")
    Image.fromarray(np.full((72, 96), 40_000, np.uint16)).save(folder / "2.depth.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_the_source_stays_as_it_is_and_undo_takes_all_back(command: str, drawings: Path, tmp_path: Path) -> None:
    before, out = state(drawings), tmp_path / "out"
    arguments = [command, str(drawings), str(out), *COMMANDS[command]]
    assert main([*arguments, "--dry-run"]) == 0
    assert not out.exists()
    assert main(arguments) == 0
    manifest = json.loads((out / MANIFEST).read_text())
    written = {name: digest for row in manifest["photos"] for name, digest in row["files"].items()} | manifest["files"]
    there = {file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file()}
    assert there == {*written, MANIFEST}
    assert all(hashlib.sha256((out / name).read_bytes()).hexdigest() == digest for name, digest in written.items())
    for row in manifest["photos"]:
        assert row["sha256"] == hashlib.sha256((drawings / row["source"]).read_bytes()).hexdigest()
    assert (manifest["schema"], manifest["command"], len(manifest["photos"])) == (1, command, 5)
    assert state(drawings) == before
    assert main(["--undo", str(out)]) == 0
    assert not out.exists()
    assert state(drawings) == before
    assert [path.name for path in tmp_path.iterdir()] == ["drawings"]


def test_undo_leaves_what_a_person_changed_or_added(drawings: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    dedupe(drawings, out)
    (out / "1.txt").write_text("my own words")
    (out / "new.txt").write_text("mine")
    would = undo(out / MANIFEST, dry_run=True)
    assert (would.kept, (out / "0.png").is_file()) == (["1.txt", "new.txt"], True)
    done = undo(out)
    assert done.removed == would.removed
    assert sorted(path.name for path in out.iterdir()) == ["1.txt", "new.txt"]
    assert "2 stay" in done.sentence


@pytest.mark.parametrize("name", ["../drawings/0.png", "/etc/hostname", "C:\\x", "a/../../drawings/0.png", "", 7])
def test_a_manifest_can_remove_nothing_outside_of_its_folder(name: object, drawings: Path, tmp_path: Path) -> None:
    out, digest = tmp_path / "out", hashlib.sha256((drawings / "0.png").read_bytes()).hexdigest()
    out.mkdir()
    row = [name, digest]
    (out / MANIFEST).write_text(json.dumps({"schema": 1, "photos": [{"files": [row]}], "files": {}}))
    with pytest.raises(BadInput, match="nothing was removed"):
        undo(out)
    assert (drawings / "0.png").is_file()


def test_undo_follows_no_link_out(drawings: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    dedupe(drawings, out)
    (out / "0.png").unlink()
    os.symlink(drawings / "0.png", out / "0.png")
    assert undo(out).kept == ["0.png"]
    assert (drawings / "0.png").is_file()


@pytest.mark.parametrize(
    ("content", "word"),
    [("{", "JSON"), ('{"schema": 1}', "not the manifest"), ('{"schema": 9, "photos": [], "files": {}}', "schema 9")],
)
def test_a_manifest_that_is_none_is_one_sentence(
    content: str, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / MANIFEST).write_text(content)
    assert main(["--undo", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert (error.count("\n"), word in error) == (1, True)
    assert (tmp_path / MANIFEST).is_file()


def test_an_error_on_the_way_leaves_nothing(drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = work._write_file

    def fails_at_the_third(file: work.Written, folder: Path) -> str:
        if file.name.startswith("2"):
            raise OSError(28, "No space left on device", str(folder / file.name))
        return copied(file, folder)

    monkeypatch.setattr(work, "_write_file", fails_at_the_third)
    with pytest.raises(OSError, match="No space"):
        dedupe(drawings, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["drawings"]


def test_bad_places_are_refused_before_any_work(drawings: Path, tmp_path: Path) -> None:
    before = state(drawings)
    for out, word in ((drawings / "out", "lies inside"), (drawings, "already exists"), (tmp_path, "already exists")):
        with pytest.raises(BadInput, match=word):
            dedupe(drawings, out)
    assert state(drawings) == before


def test_two_photos_of_one_new_name_are_refused(photos: Path, tmp_path: Path) -> None:
    Image.open(photos / "1.png").save(photos / "0.bmp")
    assert main(["resize", str(photos), str(tmp_path / "out"), "--resolution", "20"]) == 2
    assert not (tmp_path / "out").exists()


def test_too_little_room_is_said_before_any_work(
    drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work.shutil, "disk_usage", lambda path: Free())
    with pytest.raises(BadInput, match="are free"):
        dedupe(drawings, tmp_path / "out")


class Free:
    free = 1000


def test_captions_of_lists_keep_their_further_columns(photos: Path, tmp_path: Path) -> None:
    rows = [{"file_name": f"{number}.png", "text": f"nr {number}, red", "licence": "CC0"} for number in range(3)]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["tags", str(photos), str(tmp_path / "out"), "--drop", "Red"]) == 0
    assert caption_rows(tmp_path / "out") == {f"{number}.png": f"nr {number}" for number in range(3)}
    lines = (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(line)["licence"] for line in lines] == ["CC0"] * 3


def test_a_set_is_what_training_reads(drawings: Path) -> None:
    entries = {entry.name: entry for entry in read_set(drawings).entries}
    assert [file.name for file in entries["0.png"].companions] == ["0.mask.png"]
    assert [file.parent.name for file in entries["1.png"].companions] == ["masks"]
    assert [file.name for file in entries["2.png"].companions] == ["2.depth.png"]
    assert entries["3.png"].caption == "sks, red, number 3"


def test_masks_and_companions_are_resized_with_their_photo(photos: Path, tmp_path: Path) -> None:
    write_companions(photos)
    mask = Image.new("L", (48, 40), 0)
    mask.paste(255, (0, 0, 24, 40))
    mask.save(photos / "0.mask.png")
    deep = np.linspace(0, 65_535, 48 * 40).reshape(40, 48).astype(np.uint16)
    Image.fromarray(deep).save(photos / "1.depth.png")
    clear = Image.open(photos / "2.png").convert("RGBA")
    clear.paste((0, 0, 0, 0), (0, 0, 48, 20))
    clear.save(photos / "2.png")
    out = tmp_path / "out"
    assert main(["resize", str(photos), str(out), "--resolution", "20"]) == 0
    names = ["0.png", "0.mask.png", "0.depth.png", "0.before.png", "1.depth.png", "2.png", "2.mask.png"]
    assert {Image.open(out / name).size for name in names} == {(24, 20)}
    half = np.asarray(Image.open(out / "0.mask.png"))
    assert (half[:, :11].min(), half[:, 13:].max()) == (255, 0)
    assert 60_000 < np.asarray(Image.open(out / "1.depth.png")).max() <= 65_535
    alpha = np.asarray(Image.open(out / "2.mask.png"))
    assert (alpha[:9].max(), alpha[11:].min()) == (0, 255)
    assert Image.open(out / "2.png").getpixel((3, 3)) == (255, 255, 255)


def test_finetune_data_is_the_same_command(drawings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert finetune(["data", "split", str(drawings), out, "--hold-out", "1", "--json"]) == (0, "")
    assert json.loads(capsys.readouterr().out)["counts"] == {"for training": 3, "held out": 1, "left out": 1}
    assert finetune(["data", "dedupe", "--undo", out])[0] == 0
    assert not Path(out).exists()
    assert finetune(["data", "check", "/nowhere"])[0] == 2
    assert "there is no folder" in capsys.readouterr().err
    assert finetune(["data", "--help"])[0] == 0
    assert "usage: finetune data" in capsys.readouterr().out
