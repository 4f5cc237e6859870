"""dedupe, split, resize, tags and sheet: what each keeps, changes and says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_findings_of_a_set import texture

from data_tools.__main__ import main
from data_tools.check import check
from data_tools.dedupe import Seen, _best, dedupe
from data_tools.hashes import Look
from data_tools.photo_set import Entry
from data_tools.resize import resize, smaller
from data_tools.sheet import grid, page, sheet
from data_tools.split import split
from data_tools.tags import TagRules, change, frequencies
from finetune.core.errors import BadInput
from finetune.data.captions import caption_files
from finetune.data.photos import scan


@pytest.fixture
def doubled(tmp_path: Path) -> Path:
    """Six photos; 0 has a larger copy with a caption, 1 a smaller one, 2 the same file again."""
    folder = tmp_path / "doubled"
    folder.mkdir()
    for number in range(6):
        texture(number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"nr {number}")
    texture(0).resize((400, 400)).save(folder / "larger.png")
    (folder / "smaller.txt").write_text("of the smaller one")
    texture(1).resize((200, 200)).save(folder / "smaller.jpg", quality=70)
    (folder / "z.png").write_bytes((folder / "2.png").read_bytes())
    return folder


def test_dedupe_keeps_the_largest_and_its_copys_caption(doubled: Path, tmp_path: Path) -> None:
    done = dedupe(doubled, tmp_path / "out")
    left = {step.source.name: step.why for step in done.plan.steps if step.action == "left out"}
    assert left.keys() == {"0.png", "smaller.jpg", "z.png"}
    assert "larger.png" in left["0.png"]
    photos = scan(tmp_path / "out")
    assert [photo.path.name for photo in photos] == ["1.png", "2.png", "3.png", "4.png", "5.png", "larger.png"]
    captions = caption_files(tmp_path / "out", photos)
    assert (captions["larger.png"], captions["1.png"]) == ("nr 0", "nr 1")
    assert [file.problems for file in check(tmp_path / "out", 200).files] == [[]] * 6


def test_of_a_chain_both_ends_stay() -> None:
    """A photo goes only for one that it looks like itself: 2 looks like 1, which goes for 0."""
    look = Look(0, np.zeros((16, 16, 3), dtype=np.uint8))
    seen = [Seen(Entry(Path(f"{n}.png")), look, pixels=100 - n, size=1) for n in range(4)]
    assert _best([(0, 1), (1, 2)], seen) == [0, 0, 2, 3]


def test_split_holds_out_by_content_and_never_a_copy(doubled: Path, tmp_path: Path) -> None:
    done = split(doubled, tmp_path / "one", 2)
    held = sorted(path.name for path in (tmp_path / "one" / "held_out").glob("*.png"))
    assert done.counts == {"for training": 7, "held out": 2}
    assert set(held) <= {"3.png", "4.png", "5.png"}
    for name in held:
        (doubled / name).rename(doubled / f"a-{name}")
    split(doubled, tmp_path / "two", 2)
    assert sorted(path.name for path in (tmp_path / "two" / "held_out").glob("*.png")) == [
        f"a-{name}" for name in held
    ]
    with pytest.raises(BadInput, match="3 look like no other one"):
        split(doubled, tmp_path / "three", 4)


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [((100, 50), "shorter", (80, 40)), ((50, 100), "longer", (20, 40)), ((40, 40), "shorter", None)],
)
def test_smaller_sizes(size: tuple[int, int], side: str, expected: tuple[int, int] | None) -> None:
    assert smaller(size, 40, side) == expected


def test_resize_turns_upright_and_leaves_no_metadata(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    texture().resize((160, 80)).save(folder / "a.jpg", exif=exif)
    texture(1).resize((30, 30)).save(folder / "b.png")
    done = resize(folder, tmp_path / "out", 40)
    assert [step.line for step in done.plan.steps] == [
        "a.jpg: resized as a.png (80x160 to 40x80)",
        "b.png: copied (not larger)",
    ]
    with Image.open(tmp_path / "out" / "a.png") as image:
        assert (image.size, dict(image.getexif()), "icc_profile" in image.info) == ((40, 80), {}, False)
    assert (tmp_path / "out" / "b.png").read_bytes() == (folder / "b.png").read_bytes()
    with pytest.raises(BadInput, match="'gif' is unknown"):
        resize(folder, tmp_path / "other", 40, saved="gif")


def test_tags_are_changed_in_the_order_of_the_rules() -> None:
    caption = "sks, red_hair, (smile:1.1), tree, sky"
    assert change(caption, TagRules(drop=("Red hair", "smile")), "a") == "sks, tree, sky"
    assert change(caption, TagRules(most=2), "a") == "sks, red_hair"
    rules = TagRules(shuffle=True, keep_first=1)
    orders = {name: change(caption, rules, name) for name in "abcdefgh"}
    assert len(set(orders.values())) > 2
    assert {frozenset(text.split(", ")) for text in orders.values()} == {frozenset(caption.split(", "))}
    assert all(text.startswith("sks, ") for text in orders.values())
    assert orders["a"] == change(caption, rules, "a") != change(caption, TagRules(shuffle=True, seed=1), "a")


def test_tags_are_counted(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, text in enumerate(("sks, red_hair", "sks, red hair, sky, sky", "")):
        (photos / f"{number}.txt").write_text(text)
    assert [(item.tag, item.photos) for item in frequencies(photos)] == [("red hair", 2), ("sks", 2), ("sky", 1)]
    assert main(["tags", str(photos)]) == 0
    assert "      2  sks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["tags", "{photos}"], "has a caption"),
        (["tags", "{photos}", "out", "--keep-first", "1"], "--shuffle"),
        (["tags", "{photos}", "--drop", "x"], "OUT is missing"),
        (["tags", "{photos}", "--blacklist", "/nowhere"], "--blacklist /nowhere"),
        (["split", "{photos}", "out", "--hold-out", "3"], "hold out fewer"),
        (["dedupe", "/nowhere", "out"], "/nowhere"),
        (["sheet", "/nowhere", "out"], "/nowhere"),
        (["--undo", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_input_of_each_command_is_one_sentence(
    arguments: list[str], word: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main([text.format(photos=photos) for text in arguments]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "photos" not in line[:40] or "error" in line]
    assert len(error) == 1
    assert error[0].startswith("error: ")
    assert word in error[0]
    assert not (tmp_path / "out").exists()


def test_a_sheet_shows_every_photo_with_its_findings(doubled: Path, tmp_path: Path) -> None:
    (doubled / "3.txt").write_text("<script>alert(1)</script>")
    (doubled / "bad.jpg").write_bytes(b"x")
    findings = check(doubled, 300)
    done = sheet(findings, tmp_path / "out")
    html = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert html == page(findings)
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    for file in findings.files:
        assert f"<b>{file.name}</b>" in html
    assert html.count("<img ") == len(list((tmp_path / "out" / "thumbs").iterdir())) == 9
    assert html.index("<b>bad.jpg</b>") < html.index("<b>0.png</b>") < html.index("<b>larger.png</b>")
    with Image.open(tmp_path / "out" / "sheet.png") as image:
        assert np.array_equal(np.asarray(image), np.asarray(grid(findings.worst_first)))
    assert done.counts["leave out"] == 2


def test_json_of_a_command_is_all_that_stdout_holds(
    doubled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["dedupe", str(doubled), str(tmp_path / "out"), "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["dry_run"], told["counts"]) == (True, {"copied": 6, "left out": 3})
