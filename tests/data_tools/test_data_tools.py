"""`python -m data_tools check`: what it says of good, bad and doubled files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED
from PIL import Image

from data_tools.__main__ import main
from data_tools.check import NEAR, Findings, check, difference_hash
from finetune.data.decoding import open_image

MUGS = Path(__file__).parents[2] / "examples" / "subject_mug"


def call(*arguments: str, width: int = 80) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data_tools", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={"COLUMNS": str(width)}, cwd=MUGS.parents[1])


def problems(findings: Findings) -> dict[str, list[str]]:
    return {file.name: file.problems for file in findings.files}


def test_masks_are_no_photos_and_are_not_told_of(photos: Path) -> None:
    Image.new("L", (48, 40), 255).save(photos / "0.mask.png")
    (photos / "masks").mkdir()
    told = json.loads(call("check", str(photos), "--json").stdout)
    assert [row["name"] for row in told["files"]] == ["0.png", "1.png", "2.png"]
    assert "mask" not in json.dumps(told["notes"])
    Image.new("L", (48, 40), 255).save(photos / "nine.mask.png")
    assert "nine.mask.png" in json.dumps(json.loads(call("check", str(photos), "--json").stdout)["notes"])


def test_sizes_captions_and_problems(photos: Path) -> None:
    (photos / "0.txt").write_text("a red mug")
    (photos / "bad.jpg").write_bytes(b"x")
    Image.new("RGB", (600, 100), "red").save(photos / "long.png")
    done = call("check", str(photos), "--resolution", "50", "--json")
    told = json.loads(done.stdout)
    rows = {row["name"]: row for row in told["files"]}
    assert done.returncode == 1
    assert not told["fine"]
    assert rows["0.png"]["size"] == [48, 40]
    assert rows["0.png"]["caption"] == "a red mug"
    assert rows["0.png"]["problems"] == ["low resolution: enlarged 1.2 times to 50"]
    assert rows["bad.jpg"]["problems"] == ["not an image, or its beginning is damaged"]
    assert rows["long.png"]["problems"] == [
        "extreme shape: a square crop keeps 17% of it",
        "hardly any contrast: its values span 0 of 255",
    ]


def test_twins_are_found_and_strangers_are_not(tmp_path: Path) -> None:
    names = sorted(MUGS.glob("*.png"))[:3]
    for file in names:
        open_image(file).save(tmp_path / file.name)
    image = open_image(names[0])
    image.resize((200, 200)).save(tmp_path / "smaller.jpg", quality=60)
    (tmp_path / "z.png").write_bytes((tmp_path / names[0].name).read_bytes())
    looked = problems(check(tmp_path, 64))
    assert looked["z.png"] == [f"the same file as {names[0].name}"]
    assert looked["smaller.jpg"][0].startswith(f"nearly the same as {names[0].name} (")
    assert [looked[file.name] for file in names] == [[], [], []]


def test_a_twin_is_seen_through_its_exif_rotation(tmp_path: Path) -> None:
    image = open_image(sorted(MUGS.glob("*.png"))[0])
    image.save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.jpg", exif=exif)
    findings = check(tmp_path, 64)
    assert findings.files[1].orientation == "sideways"
    assert problems(findings)["b.jpg"][0].startswith("nearly the same as a.png")


def test_the_hash_compares_each_pixel_with_its_right_neighbour() -> None:
    """Against the definition, on pictures that need no shrinking."""
    values = np.random.default_rng(0).integers(0, 256, (8, 9), dtype=np.uint8)
    bits = [str(int(values[row, column] < values[row, column + 1])) for row in range(8) for column in range(8)]
    assert difference_hash(Image.fromarray(values)) == int("".join(bits), 2)
    photo = open_image(sorted(MUGS.glob("*.png"))[0])
    mirrored = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert (difference_hash(photo) ^ difference_hash(mirrored)).bit_count() > NEAR


def test_notes_are_facts_that_the_training_handles(tmp_path: Path) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    Image.fromarray(noise, "RGBA").save(tmp_path / "alpha.png")
    Image.fromarray(noise[::-1, :, :3]).convert("CMYK").save(tmp_path / "cmyk.tiff")
    Image.fromarray(noise[:, ::-1, 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    frames = [Image.fromarray(noise[:, :, k]) for k in (1, 2)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    stills = [Image.fromarray(noise[shift:, :, :3]).resize((64, 64)) for shift in (9, 30)]
    stills[0].save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=stills[1:])
    findings = check(tmp_path, 64)
    assert {file.name: file.notes for file in findings.files} == {
        "alpha.png": ["transparency: put on white"],
        "cmyk.tiff": ["CMYK: converted"],
        "deep.png": ["16 bits or more: scaled to 8", "grey"],
        "moving.gif": ["the first of 2 frames is used", "grey"],
        "phone.jpg": ["the file holds a further picture, such as a gain map, which is not used"],
    }
    assert findings.fine


def test_captions_that_fit_nothing(photos: Path) -> None:
    (photos / "captions.csv").write_text("0.png,a mug\nother.png,a car\n")
    (photos / "0.png.txt").write_text("a misnamed caption")
    (photos / "film.mov").write_bytes(b"x")
    findings = check(photos, 40)
    assert findings.problems == [
        "no caption for 1.png, 2.png, while the others have one: training uses a template for these",
        "captions for images that are not there: other.png",
    ]
    assert [note for note in findings.notes if "OpenCV" not in note] == ["not read: 0.png.txt, film.mov"]
    (photos / "metadata.jsonl").write_text("{")
    assert "line 1" in check(photos, 40).problems[0]


def test_the_table_and_exit_codes(photos: Path, tmp_path: Path) -> None:
    fine = call("check", str(photos), "--resolution", "40", width=200)
    assert fine.returncode == 0
    assert "48x40" in fine.stdout
    assert "nothing to do" in fine.stdout
    bad = call("check", str(photos), width=200)
    assert bad.returncode == 1
    assert bad.stdout.count("low resolution: enlarged 12.8 times to 512") == 3
    for arguments in (["check", str(tmp_path / "none")], ["check", str(tmp_path / "none"), "--json"]):
        missing = call(*arguments)
        assert missing.returncode == 2
        assert missing.stderr.startswith("error: there is no folder")
        assert missing.stderr.count("\n") == 1
    assert call("check", str(photos), "--resolution", "many").returncode == 2


def test_a_long_table_ends_with_what_it_leaves_out(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("data_tools.check.ROWS", 1)
    assert main(["check", str(photos), "--resolution", "41"]) == 1
    told = capsys.readouterr().out
    assert "... and 2 more, 2 of them with problems: --json and finetune data sheet show all" in told
    assert ("0.png" in told, "2.png" in told) == (True, False)
    assert len(json.loads(_json_of(capsys, photos))["files"]) == 3


def _json_of(capsys: pytest.CaptureFixture[str], photos: Path) -> str:
    main(["check", str(photos), "--resolution", "41", "--json"])
    return capsys.readouterr().out


def test_it_imports_nothing_heavy(photos: Path) -> None:
    heavy = "{'torch', 'diffusers', 'transformers', 'peft', 'accelerate'}"
    program = (
        "import sys; from data_tools.__main__ import main\n"
        f"main(['check', {str(photos)!r}, '--resolution', '40'])\n"
        f"assert not {heavy} & sys.modules.keys()\n"
        "try: main(['check', '--help'])\n"
        "finally: print('ended')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=MUGS.parents[1])
    assert done.returncode == 0, done.stderr
    light = "import sys\ntry:\n import data_tools.__main__ as m; m.main(['--help'])\nexcept SystemExit: pass\n"
    light += "assert not {'numpy', 'PIL', 'rich', 'torch'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", light], capture_output=True, text=True, cwd=MUGS.parents[1])
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not (SHARED / "photos").is_dir(), reason="the DreamBooth photos are not here")
def test_real_photos() -> None:
    findings = check(SHARED / "photos" / "dog")
    assert len(findings.files) == 5
    assert findings.fine


@pytest.mark.slow
def test_it_says_for_which_resolution_it_checked(tiny_bases: dict[str, Path]) -> None:
    def told(*options: str) -> tuple[int, str]:
        done = call("check", str(MUGS), "--json", *options)
        return done.returncode, json.loads(done.stdout)["notes"][0]

    assert told()[0] == 1, "256 pixels are few for 512"
    assert told()[1].startswith("checked for training at 512 pixels (SD 1.x")
    code, note = told("--base", "tiny")
    assert (code, "128 pixels (the resolution of tiny, family sd1)" in note) == (0, True)
    assert told("--base", "tiny", "--resolution", "600") == (1, "checked for training at 600 pixels (--resolution)")
    wrong = call("check", str(MUGS), "--base", "/nowhere")
    assert (wrong.returncode, "/nowhere" in wrong.stderr) == (2, True)
