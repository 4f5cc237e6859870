"""What a run was made from, compared with what is there now: every change is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.core.errors import BadInput
from finetune.core.reading import MAX_BYTES
from finetune.core.records import LaterVersion
from finetune.runs.inputs import (
    FILE,
    Accepted,
    InputsRecord,
    PinnedPhoto,
    RunInputs,
    caption_pin,
    changes,
    in_recorded_order,
    read_inputs,
    refusal,
    write_inputs,
)


def photo(name: str, digest: str = "", caption: str = "a dog", **beside: str) -> PinnedPhoto:
    return PinnedPhoto(name=name, sha256=digest or name, captions=[caption], beside=beside)


WHOLE = RunInputs(
    photos=[photo("a.png"), photo("b.png", mask="1"), photo("c.png")],
    class_images={"a dog": ["1", "2", "3"]},
    base={"unet/config.json": "1", "vae/config.json": "2"},
    packages={"torch": "2.13.0"},
    precision="fp32",
    tokens=["zwx"],
)


@pytest.mark.parametrize(
    ("update", "named"),
    [
        ({}, []),
        ({"photos": [photo("a.png", "edited"), *WHOLE.photos[1:]]}, ["the photo a.png is not the same image"]),
        ({"photos": WHOLE.photos[:2]}, ["the photo c.png is gone"]),
        ({"photos": [*WHOLE.photos, photo("d.png")]}, ["the photo d.png is new"]),
        ({"photos": [photo("moved.png", "a.png"), *WHOLE.photos[1:]]}, []),
        ({"photos": WHOLE.photos[::-1]}, ["the photos come in another order"]),
        ({"photos": [photo("a.png", caption="a cat"), *WHOLE.photos[1:]]}, ["the caption of a.png changed"]),
        ({"photos": [WHOLE.photos[0], photo("b.png", mask="2"), WHOLE.photos[2]]}, ["the mask of b.png changed"]),
        ({"photos": [WHOLE.photos[0], photo("b.png"), WHOLE.photos[2]]}, ["the mask of b.png changed"]),
        (
            {
                "photos": [
                    photo("a.png", "edited", "a cat"),
                    photo("b.png", mask="2"),
                    photo("d.png", "c.png", "a cow"),
                ]
            },
            [
                "the photo a.png is not the same image",
                "the caption of a.png changed",
                "the mask of b.png changed",
                "the caption of d.png changed",
            ],
        ),
        (
            {"photos": [photo("b.png", mask="2"), photo("d.png")]},
            [
                "the photo a.png is gone",
                "the photo c.png is gone",
                "the photo d.png is new",
                "the mask of b.png changed",
            ],
        ),
        ({"class_images": {"a dog": ["1", "x", "3"]}}, ["1 of the class images of 'a dog' changed"]),
        ({"class_images": {}}, []),
        ({"base": {"unet/config.json": "9", "vae/config.json": "2"}}, ["the base's file unet/config.json changed"]),
        ({"base": {"vae/config.json": "2"}}, ["the base's file unet/config.json is gone"]),
        ({"base": {**WHOLE.base, "more.json": "1"}}, ["the base's file more.json is new"]),
        ({"packages": {"torch": "2.12.0"}}, ["torch is 2.12.0 and was 2.13.0"]),
        ({"packages": {"torch": "2.13.0", "pillow": "12"}}, []),  # an older version recorded fewer
        ({"packages": {}}, ["torch is not installed and was 2.13.0"]),
        ({"precision": "bf16"}, ["the precision is bf16 here and was fp32"]),
        ({"tokens": ["sks"]}, ["the token ['sks'] was ['zwx']"]),
    ],
)
def test_every_change_is_named(update: dict[str, object], named: list[str]) -> None:
    assert changes(WHOLE, WHOLE.model_copy(update=update)) == named


def test_two_equal_photos_are_two() -> None:
    twice = RunInputs(photos=[photo("a.png", "same"), photo("b.png", "same")])
    assert changes(twice, RunInputs(photos=[photo("a.png", "same")])) == ["the photo a.png is gone"]


def test_photos_of_one_name_are_found_by_content_first() -> None:
    before = RunInputs(photos=[photo("1.png", "x"), photo("1.png", "y", mask="1")])
    after = RunInputs(photos=[photo("1.png", "y", mask="1"), photo("1.png", "z", "a cat")])
    assert changes(before, after) == ["the photo 1.png is not the same image", "the caption of 1.png changed"]


def test_photos_that_moved_are_put_into_the_recorded_order() -> None:
    digests = ["c.png", "new", "b.png", "a.png"]
    assert in_recorded_order(digests, WHOLE) == [3, 2, 0, 1]
    assert in_recorded_order(["x", "x"], RunInputs(photos=[photo("p", "x"), photo("q", "x")])) == [0, 1]


def test_the_record_comes_back_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    assert read_inputs(tmp_path) is None
    record = InputsRecord(inputs=WHOLE, accepted=[Accepted(step=3, changes=["the photo d.png is new"])])
    write_inputs(tmp_path, record)
    assert read_inputs(tmp_path) == record
    text = (tmp_path / FILE).read_text(encoding="utf-8")
    for broken in ("", text[: len(text) // 2], "[]", '{"schema": 1}', "null", '{"schema": 99, "inputs": {}}'):
        (tmp_path / FILE).write_text(broken, encoding="utf-8")
        with pytest.raises(BadInput, match=FILE):
            read_inputs(tmp_path)


def test_a_record_of_many_photos_comes_back(tmp_path: Path) -> None:
    """About 270,000 photos make a file that is larger than other JSON files may be: such a run could not go on."""
    record = InputsRecord(inputs=RunInputs(photos=[photo("a.png", caption="x" * MAX_BYTES)]))
    write_inputs(tmp_path, record)
    assert read_inputs(tmp_path) == record


def test_a_record_of_a_later_version_is_no_damage(tmp_path: Path) -> None:
    (tmp_path / "inputs.json").write_text('{"schema": 99}')
    with pytest.raises(LaterVersion, match="has schema 99"):
        read_inputs(tmp_path)


def test_the_refusal_counts_what_it_does_not_name(tmp_path: Path) -> None:
    said = refusal(tmp_path, [f"the photo {n}.png is gone" for n in range(9)])
    assert "0.png" in said
    assert "and 4 more" in said
    assert "--accept-changes" in said


def test_a_record_without_a_precision_is_of_an_older_version() -> None:
    assert changes(WHOLE.model_copy(update={"precision": ""}), WHOLE) == []


def test_the_captions_of_many_photos_are_compared_by_a_digest() -> None:
    """Also with a record that has them in full, as older versions wrote it."""
    several = PinnedPhoto(name="a.png", sha256="a", captions=["a dog", "a big dog"])
    short = several.model_copy(update={"captions": caption_pin(several.captions)})
    assert len(short.captions) == 1
    assert caption_pin(short.captions) == short.captions
    for one, other in ((several, short), (short, several), (short, short)):
        assert changes(RunInputs(photos=[one]), RunInputs(photos=[other])) == []
    edited = short.model_copy(update={"captions": caption_pin(["a dog", "a big cat"])})
    for old in (several, short):
        assert changes(RunInputs(photos=[old]), RunInputs(photos=[edited])) == ["the caption of a.png changed"]


def test_a_hundred_thousand_photos_are_compared_in_any_order() -> None:
    """Looking for each among all would take 10 billion comparisons, which no test could wait for."""
    names = [f"{number}.png" for number in range(100_000)]
    recorded = RunInputs(photos=[PinnedPhoto.model_construct(name=n, sha256=n, captions=["a dog"]) for n in names])
    assert in_recorded_order(names[::-1], recorded) == list(range(100_000))[::-1]
    now = recorded.model_copy(update={"photos": [*recorded.photos[:0:-1], photo("new.png")]})
    assert changes(recorded, now) == ["the photo 0.png is gone", "the photo new.png is new"]
