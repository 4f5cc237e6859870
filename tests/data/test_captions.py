"""Captions beyond the happy path: what the summary warns of, and caption files as people write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.core.errors import BadInput
from finetune.data.captions import Captioned, Words, caption_photos, caption_rows, summarise
from finetune.data.photos import scan


def captioned(
    folder: Path, mode: str = "auto", noun: str | None = "mug", template: str = "a {token}"
) -> list[Captioned]:
    return caption_photos(scan(folder), captions=mode, templates=[template], words=Words("sks", noun))


def test_the_summary_counts_and_warns_of_a_missing_token(photos: Path) -> None:
    assert summarise(captioned(photos), Words("sks", "mug")) == "0 of 3 photos captioned by files, 3 by templates"
    (photos / "0.txt").write_text("a sks mug")
    assert "WARNING" not in summarise(captioned(photos), Words("sks", "mug"))
    (photos / "1.txt").write_text("two tasks on a desk")  # the letters are there, the token is not
    summary = summarise(captioned(photos), Words("sks", "mug"))
    assert summary.startswith("2 of 3 photos captioned by files, 1 by templates; WARNING")
    assert "1.png" in summary
    assert "0.png" not in summary


@pytest.mark.parametrize("noun", [None, ""])
def test_a_template_without_its_noun(photos: Path, noun: str | None) -> None:
    with pytest.raises(BadInput, match="set data"):
        captioned(photos, noun=noun, template="a {token} {noun}")
    assert captioned(photos, noun=noun)[0].captions == ["a sks"]


def test_csv_with_quotes_and_byte_order_mark(photos: Path) -> None:
    (photos / "captions.csv").write_text('\ufeff0.png,"red, on a table"\n\n1.png, {token}\n', "utf-8")
    assert [item.captions[0] for item in captioned(photos)] == ["red, on a table", "sks", "a sks"]


def test_a_csv_header_is_no_caption(photos: Path) -> None:
    (photos / "captions.csv").write_text("file_name,text\n0.png,{noun}\n")
    assert caption_rows(photos) == {"0.png": "{noun}"}
    assert captioned(photos)[0].captions == ["mug"]


def test_jsonl_with_blank_lines_and_a_sidecar_that_wins(photos: Path) -> None:
    (photos / "metadata.jsonl").write_text(
        '{"file_name": "0.png", "text": "json"}\n\n{"file_name": "1.png", "text": ""}\n'
    )
    (photos / "0.txt").write_text("sidecar")
    assert [(item.captions[0], item.source) for item in captioned(photos)] == [
        ("sidecar", "file"),
        ("a sks", "template"),
        ("a sks", "template"),
    ]
    with pytest.raises(BadInput, match=r"1\.png, 2\.png"):
        captioned(photos, "files")


@pytest.mark.parametrize("name", ["0.txt", "metadata.jsonl", "captions.csv"])
def test_captions_in_another_encoding_are_named(photos: Path, name: str) -> None:
    (photos / name).write_bytes("ein schönes Bild".encode("latin-1"))
    with pytest.raises(BadInput, match=f"{name} is not UTF-8"):
        captioned(photos)


@pytest.mark.parametrize(
    ("template", "warned"),
    [("a photo of {token} {noun}", True), ("a {noun}", False), ("a {token}, in {token} style", False)],
)
def test_a_trigger_that_no_caption_takes_is_a_warning(photos: Path, template: str, warned: bool) -> None:
    """The plan of such a run said to write "in sks style" in prompts, which it had never seen."""
    words = Words("sks", "mug", "in {token} style")
    found = caption_photos(scan(photos), captions="templates", templates=[template], words=words)
    assert ("'in sks style' to no caption" in summarise(found, words)) is warned


@pytest.mark.parametrize(
    ("text", "trained", "plain"),
    [
        ("two desks", "two desks sks", "two desks"),
        ("masks, sks and desks", "masks, sks and desks", "masks, and desks"),
        ("a house, SKS", "a house, SKS sks", None),  # CLIP's tokenizers read SKS as sks
    ],
)
def test_only_the_trigger_as_a_word_of_its_own_is_left_out(
    text: str, trained: str, plain: str | None, photos: Path
) -> None:
    (photos / "0.txt").write_text(text)
    words = Words("sks", None, "{token}")
    found = caption_photos(scan(photos), captions="auto", templates=["a {token}"], words=words)[0]
    assert (found.captions, found.plain) == ([trained], (plain,))
