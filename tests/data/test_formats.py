"""Every file of a photos folder is read or named: further picture formats, captions as other tools write them."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from test_train import LORA, settings

from finetune.config.load import parse_recipe
from finetune.core.errors import BadInput
from finetune.data.captions import Captioned, Words, caption_photos, caption_sources
from finetune.data.decoding import BadImage, open_image
from finetune.data.leftovers import leftovers, listed
from finetune.data.photos import companion, image_files, read_photo, scan
from finetune.data.settings import Data
from finetune.data.sources.registry import open_source
from finetune.jobs.pins import inputs_of
from finetune.jobs.plan import plan
from finetune.jobs.prepare import Prepared, prepare
from finetune.jobs.subjects import scan_subjects
from finetune.runs.plan import plan_rows, shared_rows

ROTATED = Image.Exif()
ROTATED[0x0112] = 6
HEIC = b"\0\0\0\x18ftypheic" + bytes(100)


def captioned(folder: Path, mode: str = "auto") -> dict[str, Captioned]:
    made = caption_photos(scan(folder), captions=mode, templates=["a {token}"], words=Words("sks", "mug"))
    return {item.photo.path.name: item for item in made}


def texts(folder: Path) -> list[str]:
    return [item.captions[0] for item in captioned(folder).values()]


def job(base: Path, photos: Path, **data: object) -> Prepared:
    place = {"photos": str(photos), "class_noun": "mug", **data}
    return prepare(parse_recipe(settings(base, photos, LORA, data=place, prior={"kind": "none"})))


# pictures


@pytest.mark.parametrize("name", ["3.JPE", "3.jfif", "3.JFIF", "3.Avif"])
def test_more_names_are_photos(name: str, photos: Path) -> None:
    """Last in order, so that the photos that were there keep their places."""
    with Image.open(photos / "1.png") as image:
        image.save(photos / name, format="AVIF" if name == "3.Avif" else "JPEG")
    assert [photo.path.name for photo in scan(photos)] == ["0.png", "1.png", "2.png", name]
    red, green, blue = open_image(photos / name).getpixel((40, 36))
    assert green > 180 > 60 > max(red, blue)


def heic(file: Path, image: Image.Image, **more: object) -> Path:
    pytest.importorskip("pillow_heif").register_heif_opener()
    content = io.BytesIO()
    image.save(content, format="HEIF", quality=95, **more)
    file.write_bytes(content.getvalue())
    return file


@pytest.mark.parametrize("name", ["a.heic", "a.HEIF", "a.hif", "a.jpg"])
def test_a_phones_photo_is_read(name: str, tmp_path: Path) -> None:
    """By its content, whatever its name says."""
    image = Image.new("RGB", (40, 20), "black")
    image.paste((255, 0, 0), (0, 0, 10, 20))
    (photo,) = scan(heic(tmp_path / name, image).parent)
    assert photo.size == (40, 20)
    red, green, blue = open_image(photo.path).getpixel((3, 10))
    assert red > 200 > 60 > max(green, blue)


def test_a_phones_photo_is_turned_upright_once(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), "black")
    image.paste((255, 0, 0), (0, 0, 10, 20))
    file = heic(tmp_path / "a.heic", image, exif=ROTATED.tobytes())
    upright = open_image(file)
    assert read_photo(file).size == upright.size == (20, 40)
    assert upright.getpixel((10, 3))[0] > 200 > 50 > upright.getpixel((10, 30))[0]


def test_a_damaged_one_is_no_traceback(tmp_path: Path) -> None:
    whole = heic(tmp_path / "a.heic", Image.effect_noise((64, 64), 90).convert("RGB")).read_bytes()
    for length in (100, len(whole) // 2, len(whole) - 10):
        (tmp_path / "a.heic").write_bytes(whole[:length])
        with pytest.raises(BadImage, match=r"truncated|damaged|not an image"):
            open_image(tmp_path / "a.heic")


def test_without_its_package_the_command_is_named(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    (photos / "phone.heic").write_bytes(HEIC)
    with pytest.raises(BadInput, match=r"phone\.heic \(HEIC, which needs a package: `pip install pillow-heif`\)"):
        scan(photos)


def test_a_jpeg_with_a_phones_suffix_is_read(photos: Path) -> None:
    Image.new("RGB", (48, 40), "red").save(photos / "sent.heic", format="JPEG")
    assert open_image(scan(photos)[-1].path).getpixel((5, 5))[0] > 200


def test_the_companion_is_the_one_it_always_was(photos: Path) -> None:
    for suffix in ("avif", "png"):
        (photos / f"0.depth.{suffix}").write_bytes(b"x")
    assert companion(photos / "0.png", "depth") == photos / "0.depth.png"


# captions


@pytest.mark.parametrize("name", ["1.TXT", "1.caption", "1.Caption", "1.txt"])
def test_captions_beside_the_photo(name: str, photos: Path) -> None:
    (photos / name).write_text("a {token}\n on a table")
    assert texts(photos) == ["a sks", "a sks on a table", "a sks"]
    assert caption_sources(photos, scan(photos)) == {photos / name}


def test_two_captions_of_one_photo(photos: Path) -> None:
    (photos / "1.txt").write_text("")
    (photos / "1.caption").write_text("a mug")
    assert texts(photos)[1] == "a mug"
    (photos / "1.txt").write_text("a  mug\n")
    assert texts(photos)[1] == "a mug"
    (photos / "1.txt").write_text("a cup")
    with pytest.raises(BadInput, match=r"1\.png has different captions in 1\.caption and 1\.txt: keep one"):
        texts(photos)


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_metadata(column: str, photos: Path) -> None:
    (photos / "metadata.csv").write_text(f'width,{column},file_name\n48,"red, on a table",0.png\n48,,1.png\n')
    assert texts(photos) == ["red, on a table", "a sks", "a sks"]
    (photos / "metadata.csv").unlink()
    (photos / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", column: "red"}))
    assert texts(photos) == ["red", "a sks", "a sks"]


def test_text_wins_over_other_columns(photos: Path) -> None:
    (photos / "metadata.jsonl").write_text(
        json.dumps({"prompt": "p", "caption": "c", "text": "t", "file_name": "0.png"})
    )
    (photos / "metadata.csv").write_text("prompt,caption,file_name\np,c,1.png\n")
    assert texts(photos) == ["t", "c", "a sks"]


def test_a_photos_own_file_wins_over_metadata(photos: Path) -> None:
    (photos / "metadata.csv").write_text("file_name,text\n0.png,list\n")
    (photos / "0.caption").write_text("own")
    assert texts(photos)[0] == "own"


def test_lists_that_differ(photos: Path) -> None:
    (photos / "metadata.csv").write_text("file_name,text\n0.png,one\n1.png,two\n")
    (photos / "captions.csv").write_text("0.png,one\n")
    assert texts(photos)[:2] == ["one", "two"]
    (photos / "captions.csv").write_text("0.png,another\n")
    with pytest.raises(BadInput, match=r"0\.png has different captions in metadata\.csv and captions\.csv"):
        texts(photos)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("0.png,a mug\n", "names its columns"),
        ("file_name,label\n0.png,a mug\n", "names its columns"),
        ("file_name,text\n0.png,a mug, red\n", r"row 2 of .*metadata\.csv has not the 2 columns"),
        ("file_name,text\nnine.png,a mug\n", r"metadata\.csv in .* names nine\.png, which is not there"),
    ],
)
def test_metadata_that_is_wrong(content: str, said: str, photos: Path) -> None:
    (photos / "metadata.csv").write_text(content)
    with pytest.raises(BadInput, match=said):
        texts(photos)


# what is not used


def test_leftovers_are_named(tmp_path: Path) -> None:
    for name in ("b.mov", "a.jpg", "masks/a.png", "masks/a.jpg", "raw/c.cr2", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    used = {tmp_path / "a.jpg"}
    assert leftovers(tmp_path, used) == ["b.mov", "masks/", "raw/"]
    assert leftovers(tmp_path, used | {tmp_path / "masks" / "a.png"}) == ["b.mov", "masks/a.jpg", "raw/"]


def test_long_lists_are_cut() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed([*"abcdefg"]) == "a, b, c, d, e and 2 more (7 in all)"


def test_the_plan_names_what_is_not_used(tiny_bases: dict[str, Path], photos: Path) -> None:
    base = tiny_bases["sd1"]
    assert "not used" not in plan_rows(plan(job(base, photos)))
    (photos / "0.caption").write_text("a {token} mug")
    (photos / "0.png.txt").write_text("a misnamed caption")
    (photos / "noname").write_bytes((photos / "0.png").read_bytes())
    (photos / "0.mask.png").write_bytes((photos / "0.png").read_bytes())
    (photos / "0.depth.png").write_bytes((photos / "0.png").read_bytes())
    (photos / "more").mkdir()
    (photos / "more" / "3.png").write_bytes((photos / "0.png").read_bytes())
    made = plan(job(base, photos))
    assert plan_rows(made)["not used"] == ["0.depth.png, 0.mask.png, 0.png.txt, more/, noname"]
    assert "not used" not in shared_rows(made)
    assert "0.mask.png" not in plan(job(base, photos, masks="auto")).unused[0]
    assert plan(job(base, photos, captions="templates")).unused == [
        "0.caption, 0.depth.png, 0.mask.png, 0.png.txt, more/ and 1 more (6 in all)"
    ]


def test_what_is_read_is_recorded(tiny_bases: dict[str, Path], photos: Path) -> None:
    Image.new("RGB", (48, 40), "red").save(photos / "3.avif")
    (photos / "0.CAPTION").write_text("a {token} cup")
    (photos / "metadata.csv").write_text("file_name,prompt\n3.avif,a red {token}\n")
    looked = job(tiny_bases["sd1"], photos)
    pinned = {photo.name: photo.captions for photo in inputs_of(looked).photos}
    assert list(pinned) == ["0.png", "1.png", "2.png", "3.avif"]
    assert pinned["0.png"] == [f"a {looked.token} cup"]
    assert pinned["3.avif"] == [f"a red {looked.token}"]


# kohya's layout


@pytest.fixture
def nested(photos: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "img"
    folder.mkdir()
    photos.rename(folder / "10_sks dog")
    (folder / "10_sks dog" / "0.caption").write_text("a dog")
    return folder


def test_kohyas_folder_is_read(nested: Path, tiny_bases: dict[str, Path]) -> None:
    (nested / "log").mkdir()
    (nested / "10_sks dog" / "film.mov").touch()
    looked = job(tiny_bases["sd1"], nested)
    assert [photo.path for photo in looked.photos] == image_files(nested / "10_sks dog")
    assert looked.captions[0] == ["a dog"]
    assert "read from the sub-folder '10_sks dog'" in looked.subjects[0].summary
    assert plan(looked).unused == ["10_sks dog/film.mov, log/"]


def test_several_of_kohyas_folders_are_refused(nested: Path) -> None:
    (nested / "5_mug").mkdir()
    assert open_source(nested).folder == nested / "10_sks dog"
    (nested / "5_mug" / "0.png").write_bytes((nested / "10_sks dog" / "0.png").read_bytes())
    with pytest.raises(BadInput, match=r"'10_sks dog', '5_mug'.*data\.subjects"):
        scan_subjects(Data(photos=nested))


def test_photos_beside_sub_folders_are_used_as_before(nested: Path) -> None:
    (nested / "0.png").write_bytes((nested / "10_sks dog" / "0.png").read_bytes())
    assert open_source(nested).folder == nested


def test_other_sub_folders_are_named(nested: Path) -> None:
    (nested / "10_sks dog").rename(nested / "dogs")
    with pytest.raises(BadInput, match=r"no images.*there are some in its folder 'dogs'"):
        scan_subjects(Data(photos=nested))


def test_a_zip_holds_the_same(photos: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as held:
        held.write(photos / "0.png", "0.png")
        for name in ("0.caption", "metadata.csv", "a.mov"):
            held.writestr(name, "file_name,text\n" if name.endswith("csv") else "a mug")
    opened = open_source(tmp_path / "p.zip")
    assert sorted(file.name for file in opened.folder.iterdir()) == ["0.caption", "0.png", "metadata.csv"]
    assert opened.unused == "not used from p.zip: a.mov"
