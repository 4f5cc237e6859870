"""A style: its words are added to the captions, a plain prompt is kept by what the base draws for it, and the page
speaks of the style."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from ends import resumed_is_the_unbroken_run
from test_subjects import fitted
from test_train import LORA, settings

from finetune.config.load import load_recipe, parse_recipe
from finetune.core.errors import BadInput
from finetune.jobs import train as job
from finetune.jobs.prepare import class_sets, prepare
from finetune.jobs.run_record import record_of
from finetune.runs.folder import RunFolder
from finetune.runs.plan import plan_rows, shared_rows

PLAIN = {"kind": "class_images", "prompt": "{caption}", "count": 4, "steps": 1, "batch_size": 2, "caption_dropout": 0}
PROMPTS = ["a house in {token} style", "a house", "a tree in {token} style"]


@pytest.fixture
def drawings(photos: Path) -> Path:
    """Three drawings: one caption without the token, one with the style's words, one drawing without a caption."""
    (photos / "0.txt").write_text("a red house.")
    (photos / "1.txt").write_text("a tree, in {token} style")
    return photos


def style(base: Path, drawings: Path, **sections: Any) -> dict[str, Any]:
    data = {"photos": str(drawings), "token": "zwx", "token_pieces": 9, "trigger": "in {token} style"}
    data |= {"templates": ["a drawing"], "class_noun": None} | sections.pop("data", {})
    prior, sample = sections.pop("prior", PLAIN), {"count": 1, "steps": 1, "prompts": PROMPTS}
    return settings(base, drawings, LORA, data=data, prior=prior, sample=sample, **sections)


def test_the_trigger_is_added_where_the_token_is_missing(tiny_bases: dict[str, Path], drawings: Path) -> None:
    looked = prepare(parse_recipe(style(tiny_bases["sd1"], drawings)))
    assert looked.captions == [["a red house in zwx style"], ["a tree, in zwx style"], ["a drawing in zwx style"]]
    assert looked.plain_captions == [["a red house"], ["a tree"], ["a drawing"]]
    assert "'in zwx style' is added to the captions of 2" in looked.subjects[0].summary
    assert "WARNING" not in looked.subjects[0].summary
    commas = prepare(
        parse_recipe(style(tiny_bases["sd1"], drawings, data={"trigger": ", {token}"}, prior={"kind": "none"}))
    )
    assert commas.captions[0] == ["a red house, zwx"]


def test_without_a_trigger_the_plan_says_what_becomes_of_the_style(
    tiny_bases: dict[str, Path], drawings: Path
) -> None:
    sections = {"data": {"trigger": ""}, "prior": {"kind": "none"}}
    looked = prepare(parse_recipe(style(tiny_bases["sd1"], drawings, **sections)))
    assert looked.captions[0] == ["a red house."]
    said = looked.subjects[0].summary
    assert "not in the caption of 0.png" in said
    assert "becomes part of every prompt" in said
    assert "data.trigger='in {token} style'" in said


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"data": {"trigger": "in my style"}}, "has no {token}"),
        ({"data": {"trigger": "{token} {stile}"}, "prior": {"kind": "none"}}, r"data.trigger has '{stile}'"),
        ({"data": {"trigger": ""}}, "which is each caption without the words of data.trigger"),
        ({"data": {"trigger": "by {token}"}}, r"the caption of 1\.png has the token 'zwx' but not the words"),
        ({"prior": {"kind": "class_images"}}, r"set prior\.prompt='{caption}'"),
        ({"prior": PLAIN | {"prompt": "{caption} {place}"}}, r"prior\.prompt has '{place}'"),
    ],
)
def test_what_would_not_say_what_was_meant_is_refused(
    sections: dict[str, Any], said: str, tiny_bases: dict[str, Path], drawings: Path
) -> None:
    with pytest.raises(BadInput, match=said):
        prepare(parse_recipe(style(tiny_bases["sd1"], drawings, **sections)))


def test_own_images_fit_no_caption(tiny_bases: dict[str, Path], drawings: Path, balls_folder: Path) -> None:
    with pytest.raises(BadInput, match="nothing says which caption each image fits"):
        prepare(parse_recipe(style(tiny_bases["sd1"], drawings, prior=PLAIN | {"folder": str(balls_folder)})))


@pytest.fixture
def balls_folder(tmp_path: Path) -> Path:
    from conftest import write_photos

    return write_photos(tmp_path / "own")


@pytest.mark.parametrize("shape", ["square", "buckets"])
def test_the_base_draws_the_captions_without_the_style_in_turn(
    shape: str, tiny_bases: dict[str, Path], drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each image is trained with what it was drawn for, and drawn for what the manifest says."""
    looked, given = fitted(style(tiny_bases["sd1"], drawings, data={"shape": shape}), tmp_path / "run", monkeypatch)
    plain = ["a drawing", "a red house", "a tree"]
    (wanted,) = class_sets(looked)
    manifest = json.loads((wanted.folder / "manifest.json").read_text())
    assert (manifest["prompts"], len(manifest["pictures"])) == (plain, 4)
    assert "prompt" not in manifest
    stream = given["batches"].streams[1]
    assert [sample.captions for sample in stream] == [[plain[n % 3]] for n in range(4)]
    assert [sample.crops[0].photo.path.name for sample in stream] == [f"0000{n}.png" for n in range(4)]
    seen = Counter(given["batches"].micro(step, 0).prompts[1] for step in range(12))
    assert seen == {"a drawing": 6, "a red house": 3, "a tree": 3}
    assert given["step"].encode_prompts(plain, None)  # all are in the cache


def test_other_captions_have_another_set_and_another_order_has_the_same(
    tiny_bases: dict[str, Path], drawings: Path
) -> None:
    (one,) = class_sets(prepare(parse_recipe(style(tiny_bases["sd1"], drawings))))
    (drawings / "1.txt").rename(drawings / "2.txt")
    (drawings / "0.txt").rename(drawings / "1.txt")
    (turned,) = class_sets(prepare(parse_recipe(style(tiny_bases["sd1"], drawings))))
    assert turned.folder == one.folder
    (drawings / "1.txt").write_text("a blue house")
    (other,) = class_sets(prepare(parse_recipe(style(tiny_bases["sd1"], drawings))))
    assert other.folder != one.folder


def test_frozen_base_holds_each_drawing_to_its_own_caption(
    tiny_bases: dict[str, Path], drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a drawing has several templates: the one that the step draws counts."""
    prior = {"kind": "frozen_base", "prompt": "{caption}", "caption_dropout": 0}
    data = {"templates": ["a drawing", "a picture", "a sketch"]}
    _, given = fitted(style(tiny_bases["sd1"], drawings, prior=prior, data=data), tmp_path / "run", monkeypatch)
    (keep,) = given["step"].options.regularizers
    for batch in (given["batches"].micro(step, 0) for step in range(20)):
        plain = [text.replace(" in zwx style", "").rstrip(",") for text in batch.prompts]
        assert keep.prompts(batch) == plain
        assert given["step"].encode_prompts(plain, None)


@pytest.mark.parametrize(
    "prior", [PLAIN, {"kind": "frozen_base", "prompt": "{caption}"}], ids=lambda prior: prior["kind"]
)
def test_a_style_resumes_bit_for_bit_and_its_page_speaks_of_the_style(
    prior: dict[str, Any], tiny_bases: dict[str, Path], drawings: Path, tmp_path: Path
) -> None:
    unchecked = {"steps": 4, "checkpoint_every": 2}, {"verify": "off"}
    sections = dict(zip(("run", "export"), unchecked, strict=True))
    run = resumed_is_the_unbroken_run(
        parse_recipe(style(tiny_bases["sd1"], drawings, prior=prior, **sections)), tmp_path
    )
    page, info = (run / "report.html").read_text(), RunFolder(run).info
    assert "Write “in zwx style” in a prompt to get the style: <b>a house in zwx style</b>" in page
    assert "3 drawings" in page
    assert page.count("With and without the style") == 1
    told = "drawn by the base before training: 4 for 3 different captions without &#x27;in zwx style&#x27;."
    assert (told in page) == (prior["kind"] == "class_images")  # the plan's words: not 4 of "in zwx style"
    assert page.count("Measured by colours and strokes") == 1
    assert "to get the subject" not in page
    assert "a red house" not in page  # captions of files are private, also without the style
    assert info.pairs() == [(0, 1)]
    assert json.loads((run / "exports" / "run.json").read_text())["activation text"] == "in zwx style"
    assert info.planned is not None
    rows = plan_rows(info.planned), shared_rows(info.planned)
    assert all("write 'in zwx style' in prompts" in row["token"] for row in rows)
    assert all("a red house" not in str(row) for row in (rows[1], info.planned.class_images, info.planned.prior))
    before = (run / "report.html").stat().st_mtime_ns
    job.resume(run)
    assert (run / "report.html").stat().st_mtime_ns >= before


def test_the_shipped_recipe_has_pairs_and_keeps_plain_prompts(tiny_bases: dict[str, Path], drawings: Path) -> None:
    recipe = load_recipe("style-lora", [f"data.photos={drawings}", f"base={tiny_bases['sd1']}"])
    looked = prepare(recipe)
    assert recipe.prior.of_captions
    info = record_of(looked)
    assert info.pairs() == [(0, 1), (2, 3), (4, 5)]
    assert plan_rows(info.planned)["class images"].startswith("100 for 4 different captions without 'in ")
