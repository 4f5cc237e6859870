"""Data sets as other people have them, through the commands: no caption, column or photo changes without a word."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import write_photos
from PIL import Image

from data_tools import work
from data_tools.__main__ import main
from data_tools.check import check
from data_tools.convert import convert
from data_tools.dedupe import dedupe
from data_tools.items import DataSetOptions, read_items
from data_tools.tags import TagRules, tags
from data_tools.wording import BRACES, plain_tag
from finetune.core.errors import BadInput
from finetune.data import captions
from finetune.data.captions import caption_files
from finetune.data.mixes import mix_captions
from finetune.data.photos import scan
from finetune.data.set_rows import to_the_end
from finetune.jobs.words import PLACEHOLDER


def table(file: Path, columns: dict[str, list[Any]]) -> Path:
    """A parquet file with three images and the columns."""
    import pyarrow
    from pyarrow import parquet

    images = []
    for number in range(3):
        held = io.BytesIO()
        Image.new("RGB", (40, 32 + number), (90 * number, 20, 200)).save(held, "PNG")
        images.append({"bytes": held.getvalue(), "path": None})
    parquet.write_table(pyarrow.table({"image": images, **columns}), file)
    return file


def captions_of(folder: Path) -> list[str | None]:
    """As training reads them, in the photos' order."""
    photos = scan(folder)
    found = caption_files(folder, photos)
    return [found.get(photo.path.name) for photo in photos]


@pytest.mark.parametrize("to", ["jsonl", "csv"])
def test_a_column_of_the_lists_own_names_takes_no_place(to: str, tmp_path: Path) -> None:
    """A column file_name named other files than were written, and a column text took the place of the captions."""
    names, others = ["x/1.jpg", "x/2.jpg", "y/1.jpg"], ["not this", "nor that", "nor those"]
    source = table(tmp_path / "a.parquet", {"caption": ["one", "two", "three"], "text": others, "file_name": names})
    done = convert(source, tmp_path / "out", to, DataSetOptions(caption="caption"))
    assert captions_of(tmp_path / "out") == ["one", "two", "three"]
    rows = [item.row for item in read_items(tmp_path / "out").items]
    assert [row["other_text"] for row in rows] == others
    assert [row["other_file_name"] for row in rows] == names
    assert any("file_name is written as other_file_name" in note for note in done.plan.notes)


def test_a_column_called_text_is_in_parquet_and_shards_too(tmp_path: Path) -> None:
    columns = {"caption": ["one", "two", "three"], "text": ["a", "b", "c"]}
    source = table(tmp_path / "a.parquet", columns)
    for to in ("parquet", "webdataset"):
        convert(source, tmp_path / to, to, DataSetOptions(caption="caption"))
        found = read_items(tmp_path / to).items
        assert [item.caption for item in found] == columns["caption"]
        assert [item.row["other_text"] for item in found] == columns["text"]


def listed(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """`write_photos` with metadata.jsonl."""
    write_photos(folder)
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8", newline="\n")
    return folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The further columns, in the photos' order."""
    return [item.row for item in read_items(folder).items]


def test_columns_stay_where_a_photo_has_no_caption_or_one_in_a_file(tmp_path: Path) -> None:
    rows = [{"file_name": f"{number}.png", "text": text, "score": number} for number, text in enumerate(("", "a, b"))]
    photos = listed(tmp_path / "listed", [*rows, {"file_name": "2.png", "text": "old", "score": 2}])
    (photos / "2.txt").write_text("own, b", encoding="utf-8")
    tags(photos, tmp_path / "out", TagRules(drop=("b",)))
    assert captions_of(tmp_path / "out") == [None, "a", "own"]
    assert [row["score"] for row in rows_of(tmp_path / "out")] == [0, 1, 2]
    tags(photos, tmp_path / "none", TagRules(drop=("a", "b", "own")))
    assert captions_of(tmp_path / "none") == [None] * 3
    assert [row["score"] for row in rows_of(tmp_path / "none")] == [0, 1, 2]


def test_a_caption_that_is_null_is_none_and_one_that_is_no_text_is_refused(tmp_path: Path) -> None:
    rows = [
        {"file_name": "0.png", "text": None, "caption": "second"},
        {"file_name": "1.png", "text": "with\u2028line"},
    ]
    photos = listed(tmp_path / "listed", rows)
    assert captions_of(photos) == [None, "with\u2028line", None]
    assert rows_of(photos)[0] == {"caption": "second"}
    (photos / "metadata.jsonl").write_text('{"file_name": "0.png", "text": ["a", "b"]}', encoding="utf-8")
    with pytest.raises(BadInput, match="line 1 has a list as its caption"):
        captions_of(photos)


def test_columns_of_metadata_csv_go_along(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos")
    text = 'file_name,text,qwen,licence\n0.png,a,"q, 0",CC0\n1.png,b,,CC0\n2.png,,q2,\n'
    (photos / "metadata.csv").write_text(text, encoding="utf-8")
    wanted = [{"qwen": "q, 0", "licence": "CC0"}, {"licence": "CC0"}, {"qwen": "q2"}]
    for to in ("jsonl", "csv"):
        convert(photos, tmp_path / to, to)
        assert rows_of(tmp_path / to) == wanted
        assert captions_of(tmp_path / to) == ["a", "b", None]
        mixed = mix_captions(tmp_path / to, scan(tmp_path / to), {"own": 1, "qwen": 3}, [])
        assert mixed == [[("a", 1), ("q, 0", 3)], [("b", 1)], [("q2", 3)]]


def test_names_with_dots_and_of_two_formats_are_samples_of_their_own(tmp_path: Path) -> None:
    """A tar shard's sample ends at the first dot: 2024.06.jpg and 2024.07.jpg were one, and nothing read the shard."""
    photos = write_photos(tmp_path / "photos")
    for old, new in {"0.png": "2024.06.png", "1.png": "2024.07.png"}.items():
        (photos / old).rename(photos / new)
    Image.open(photos / "2.png").convert("RGB").save(photos / "2.jpg")
    for name in ("2024.06", "2024.07", "2"):
        (photos / f"{name}.txt").write_text(f"of {name}", encoding="utf-8")
    done = convert(photos, tmp_path / "shards", "webdataset")
    found = read_items(tmp_path / "shards").items
    pictures = [item.read() for item in found]
    assert pictures == [(photos / name).read_bytes() for name in ("2.jpg", "2.png", "2024.06.png", "2024.07.png")]
    assert [item.caption for item in found] == ["of 2", "of 2", "of 2024.06", "of 2024.07"]
    assert any("3 samples have other names" in note for note in done.plan.notes)


def test_two_commands_at_once_take_nothing_from_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that ended last removed the folder of the other, with all that a person had put there since."""
    photos, out = write_photos(tmp_path / "photos"), tmp_path / "out"
    written = work._write_lists

    def meanwhile(plan: work.Plan, folder: Path) -> dict[str, str]:
        out.mkdir()
        (out / "mine.txt").write_text("hours of work", encoding="utf-8")
        return written(plan, folder)

    monkeypatch.setattr(work, "_write_lists", meanwhile)
    with pytest.raises(BadInput, match=r"another command made .*out meanwhile"):
        dedupe(photos, out)
    assert [file.name for file in out.iterdir()] == ["mine.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photos"]


def test_what_a_killed_command_left_goes_after_a_day_and_no_sooner(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos")
    old, new, other = (tmp_path / f".{name}.tmp" for name in ("out.0123", "out.4567", "outer.0123"))
    for left in (old, new, other):
        left.mkdir()
        (left / "a.png").write_bytes(b"left")
    for left in (old, other):
        os.utime(left, (0, 0))
    dedupe(photos, tmp_path / "out")
    assert [left.exists() for left in (old, new, other)] == [False, True, True]


@pytest.mark.parametrize("command", ["crop", "mask", "dedupe", "split", "resize", "tags", "caption", "convert"])
def test_a_place_that_is_taken_is_refused_before_a_photo_is_opened(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = write_photos(tmp_path / "photos")
    further = {
        "split": ["--hold-out", "1"], "resize": ["--resolution", "20"], "convert": ["--to", "csv"],
        "crop": ["--resolution", "32"], "caption": ["--template", "a {name}"], "tags": ["--drop", "a"],
    }  # fmt: skip
    before = sorted(file.name for file in photos.iterdir())

    def never(path: Path, *rest: object) -> None:
        raise AssertionError(f"{path} was opened")

    for module in ("photos", "decoding"):
        monkeypatch.setattr(f"finetune.data.{module}.image_bytes", never)
    assert main([command, str(photos), str(tmp_path), *further.get(command, [])]) == 2
    assert "already exists" in capsys.readouterr().err
    assert sorted(file.name for file in photos.iterdir()) == before


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such names")
@pytest.mark.parametrize("command", ["sheet", "dedupe", "caption", "convert", "tags", "check"])
def test_a_name_that_is_no_text_is_said_and_left_out(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, out = write_photos(tmp_path / "photos"), tmp_path / "out"
    (photos / "0.txt").write_text("a, b", encoding="utf-8")
    odd = os.fsencode(photos) + b"/bad\xff"
    for ending in (b".png", b".txt"):
        Path(os.fsdecode(odd + ending)).write_bytes((photos / f"0{ending.decode()}").read_bytes())
    further = {"convert": ["--to", "jsonl"], "caption": ["--replace", "a", "z"], "tags": ["--drop", "a"]}
    places = [str(photos)] if command == "check" else [str(photos), str(out)]
    assert main([command, *places, *further.get(command, [])]) == (1 if command == "check" else 0)
    assert (
        "its name is not UTF-8" in " ".join(capsys.readouterr().out.replace("\n", " ").split()) or command == "check"
    )
    if command not in ("sheet", "check"):
        assert len(scan(out)) == 3
    if command == "sheet":
        page = (out / "index.html").read_text(encoding="utf-8")
        assert "bad\\udcff.png" in page
        assert '<meta name="viewport"' in page


def test_accents_written_in_two_ways_are_one_name(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos")
    for number, name in enumerate(("caf\u00e9.png", "cafe\u0301.png")):
        (photos / f"{number}.png").rename(photos / name)
    if len(list(photos.iterdir())) == 3:  # not on a disk that knows but one of them
        with pytest.raises(BadInput, match="would both become"):
            dedupe(photos, tmp_path / "out")


def test_a_folder_around_the_photos_says_where_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """kohya's layout, and what `convert --to imagefolder` wrote, held no images: nothing more was said."""
    write_photos(tmp_path / "photos")
    (tmp_path / "kohya" / "img").mkdir(parents=True)
    (tmp_path / "photos").rename(tmp_path / "kohya" / "img" / "10_sks dog")
    for command in (["check", "KOHYA"], ["crop", "KOHYA", "OUT"], ["convert", "KOHYA", "OUT", "--to", "csv"]):
        given = {"KOHYA": str(tmp_path / "kohya"), "OUT": str(tmp_path / "out")}
        assert main([given.get(word, word) for word in command]) == 2
        assert "there are some in its folder 'img/10_sks dog'" in capsys.readouterr().err


def test_undo_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dedupe(write_photos(tmp_path / "photos"), tmp_path / "out")
    (tmp_path / "out" / "0.png").write_bytes(b"changed")
    assert main(["--undo", str(tmp_path / "out"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["removed"], told["kept"]) == (["1.png", "2.png"], ["0.png"])


def test_a_place_below_a_file_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = write_photos(tmp_path / "photos")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    assert main(["dedupe", str(photos), str(tmp_path / "file" / "out")]) == 2
    assert "file could not be used" in capsys.readouterr().err


def test_brackets_that_belong_to_a_tag_stay() -> None:
    tags_of = {
        "dog \\(breed\\)": "dog (breed)", "dog (breed)": "dog (breed)", "(red_hair:1.2)": "red hair",
        "((Smile))": "smile",
        "(dog \\(breed\\):1.1)": "dog (breed)", "(open mouth": "open mouth", "blue eyes:1.3)": "blue eyes", ":3": ":3",
    }  # fmt: skip
    assert {text: plain_tag(text) for text in tags_of} == tags_of


def test_of_two_alike_check_keeps_the_one_that_dedupe_keeps(tmp_path: Path) -> None:
    across, down = Image.radial_gradient("L"), Image.linear_gradient("L")
    source = Image.merge("RGB", (across, down, down.rotate(90)))
    photos = tmp_path / "photos"
    photos.mkdir()
    source.resize((128, 128)).save(photos / "a small.png")
    source.save(photos / "b large.png")
    small, large = (" ".join(file.problems) for file in check(photos, 64).files)
    assert "nearly the same as b large.png" in small
    assert "nearly" not in large
    assert [step.action for step in dedupe(photos, tmp_path / "out").plan.steps] == ["left out", "copied"]


@pytest.mark.parametrize(
    "copy", ["IMG copy.png", "IMG (1).png", "IMG - Copy.png", "Copy of IMG.png", "IMG-Kopie 2.png"]
)
def test_of_two_same_files_the_copy_goes(copy: str, photos: Path, tmp_path: Path) -> None:
    shutil.copy(photos / "0.png", photos / "IMG.png")
    shutil.copy(photos / "0.png", photos / copy)
    (photos / "0.png").unlink()
    dedupe(photos, tmp_path / "out")
    assert (tmp_path / "out" / "IMG.png").is_file()
    assert not (tmp_path / "out" / copy).exists()
    found = {file.name: file.copy_of for file in check(photos, 16).files}
    assert (found["IMG.png"], found[copy]) == ("", "IMG.png")


def test_undo_does_not_remove_the_only_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos, out = write_photos(tmp_path / "photos"), tmp_path / "out"
    dedupe(photos, out)
    photos.rename(tmp_path / "elsewhere")
    assert main(["--undo", str(out)]) == 2
    assert "may be the only copies: nothing was removed" in capsys.readouterr().err
    assert len(scan(out)) == 3
    (tmp_path / "elsewhere").rename(photos)
    assert main(["--undo", str(out)]) == 0
    assert not out.exists()


def test_a_column_that_is_not_there_names_the_commands_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = table(tmp_path / "a.parquet", {"text": ["a", "b", "c"]})
    for option in ("--image", "--caption"):
        assert main(["convert", str(source), str(tmp_path / "out"), "--to", "csv", option, "nothing"]) == 2
        error = capsys.readouterr().err
        assert f"no column 'nothing' ({option})" in error
        assert "data." not in error


def test_check_says_which_braces_training_refuses(tmp_path: Path) -> None:
    texts = {"0.txt": "a {token} {noun}", "1.txt": "sks, {blush}, red", "2.txt": "{ }, {}, {a b}"}
    photos = write_photos(tmp_path / "photos")
    for name, text in texts.items():
        (photos / name).write_text(text, encoding="utf-8")
    told = [[text for text in file.problems if "braces" in text] for file in check(photos, 32).files]
    assert told == [[], ["training refuses '{blush}' in its caption: leave the braces out"], []]
    assert BRACES.pattern == PLACEHOLDER.pattern


def test_a_parquet_file_without_rows_is_not_called_damaged(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    empty = {"image": pyarrow.array([], image), "text": pyarrow.array([], pyarrow.string())}
    parquet.write_table(pyarrow.table(empty), tmp_path / "none.parquet")
    with pytest.raises(BadInput, match="has no rows: give one with images"):
        read_items(tmp_path / "none.parquet")


def test_a_full_memory_is_no_damaged_data_set() -> None:
    def rows(error: Exception) -> Iterator[int]:
        yield 1
        raise error

    with pytest.raises(BadInput, match=r"the data set pets can't be read to its end \(bad magic\): copy it again"):
        list(to_the_end(rows(ValueError("bad magic")), "pets"))
    with pytest.raises(MemoryError):
        list(to_the_end(rows(MemoryError()), "pets"))


def test_a_list_is_read_once_for_all_captions_of_a_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_photos(tmp_path / "photos")
    lines = [
        {"file_name": f"{n}.png", "text": "a", "short": f"s{n}", "long": f"l{n}", "tags": f"t{n}"} for n in range(3)
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    read: list[Path] = []
    real = captions.read_utf8
    monkeypatch.setattr(captions, "read_utf8", lambda file, *more: (read.append(file), real(file, *more))[1])
    found = mix_captions(folder, scan(folder), {"short": 0.5, "long": 0.25, "tags": 0.25}, [])
    assert found[1] == [("s1", 0.5), ("l1", 0.25), ("t1", 0.25)]
    assert read == [folder / "metadata.jsonl"]
