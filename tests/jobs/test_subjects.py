"""Several subjects in one run: each keeps its token, captions, class prompt and class images."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from ends import resumed_is_the_unbroken_run
from PIL import Image
from test_train import LORA, load_metadata, settings
from transformers import AutoTokenizer

from finetune.config.load import parse_recipe
from finetune.core.errors import BadInput
from finetune.data.batches import Batches
from finetune.data.crops import make_crops
from finetune.data.photos import scan
from finetune.data.samplers import Sample, ShuffleSampler
from finetune.evaluation.prompts_file import Called
from finetune.jobs import train as job
from finetune.jobs.class_sets import ClassSet, class_images
from finetune.jobs.dataset import held_out_photos
from finetune.jobs.evaluated import Trained, photos_trained_on
from finetune.jobs.fit import fit_job
from finetune.jobs.pins import in_order, inputs_of
from finetune.jobs.plan import plan
from finetune.jobs.prepare import Prepared, prepare
from finetune.jobs.run_record import record_of
from finetune.runs.folder import RunFolder
from finetune.runs.inputs import InputsRecord, changes, write_inputs
from finetune.runs.plan import plan_rows
from finetune.training.accelerate import make_accelerator
from finetune.training.priors.class_images import ClassImages
from finetune.training.trainer import Trainer

PROMPTS = ["a photo of {token} {noun}", "a tree", "a photo of a {noun}"]


@pytest.fixture
def balls(tmp_path: Path) -> Path:
    """Two more photos, one with the name of a photo of `photos`, one of another shape and with a caption."""
    folder = tmp_path / "balls"
    folder.mkdir()
    Image.effect_noise((48, 48), 60).convert("RGB").save(folder / "0.png")
    Image.effect_noise((80, 40), 90).convert("RGB").save(folder / "wide.png")
    (folder / "wide.txt").write_text("{token} {noun} on grass")
    return folder


def two(base: Path, photos: Path, balls: Path, **sections: Any) -> dict[str, Any]:
    data = {"photos": str(photos), "class_noun": "mug", "subjects": [{"photos": str(balls), "class_noun": "ball"}]}
    data |= sections.pop("data", {})
    sample = {"count": 1, "steps": 1, "prompts": PROMPTS}
    return settings(base, photos, LORA, data=data, sample=sample, **sections)


def fitted(recipe: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Prepared, dict[str, Any]]:
    """The job, and what the loop would be given."""
    given: dict[str, Any] = {}

    def fit(trainer: Trainer, batches: Batches, *others: Any) -> None:
        given.update(batches=batches, step=trainer.step)

    monkeypatch.setattr(Trainer, "fit", fit)
    parsed = parse_recipe(recipe)
    looked = prepare(parsed)
    fit_job(looked, RunFolder(folder), make_accelerator(parsed.run, True))
    return looked, given


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_two_subjects_from_photos_to_page(
    family: str, tiny_bases: dict[str, Path], photos: Path, balls: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    run = job.train(parse_recipe(two(tiny_bases[family], photos, balls)), tmp_path / "run", lines.append)
    info = json.loads((run / "run.json").read_text())
    one, other = (subject["token"] for subject in info["subjects"])
    assert one != other
    folders = ["tokenizer", "tokenizer_2"][: 1 + (family == "sdxl")]
    for tokenizer in (AutoTokenizer.from_pretrained(tiny_bases[family] / folder) for folder in folders):
        assert [len(tokenizer.tokenize(token)) for token in (one, other)] == [1, 1]
    assert info["captions"] == [
        *[[f"a photo of {one} mug"]] * 3,
        [f"a photo of {other} ball"],
        [f"{other} ball on grass"],
    ]
    assert info["prompts"] == [
        f"a photo of {one} mug",
        f"a photo of {other} ball",
        "a tree",
        "a photo of a mug",
        "a photo of a ball",
    ]
    for name in ("before", "after"):
        assert sorted(file.name for file in (run / "samples" / name).iterdir()) == [f"{n:02d}-0.png" for n in range(5)]
    words = f"{one} mug, {other} ball"
    page = (run / "report.html").read_text()
    maps = 2 + 2 + 0 + 1 + 1  # of the words in each prompt
    # photos; before and after, and again with their difference; class images of two nouns
    assert page.count("<img") == 5 + 2 * 5 + 3 * 5 + 2 * 2 + maps
    assert f"<b>{one} mug</b> or <b>{other} ball</b>" in page
    front = yaml.safe_load((run / "exports" / "README.md").read_text().split("---")[1])
    assert front["instance_prompt"] == words
    assert json.loads((run / "exports" / "run.json").read_text())["activation text"] == words
    assert load_metadata(run / "exports" / "run.safetensors")["modelspec.trigger_phrase"] == words
    said = [" ".join(line.split()) for line in lines]
    assert any(line.startswith(f"subject 1 3 photos, token {one} (class noun: mug)") for line in said)
    assert any(line.startswith(f"subject 2 2 photos, token {other} (class noun: ball)") for line in said)
    assert any(line.startswith("each photo NOT all are seen: 2 steps of 1 are 40% of an epoch") for line in said)
    assert "class images 2 of 'a photo of a mug' and 2 of 'a photo of a ball', each seen 0.5 times" in said


@pytest.mark.parametrize("shape", ["square", "buckets"])
def test_every_photo_once_an_epoch_beside_class_images_of_both_nouns(
    shape: str,
    tiny_bases: dict[str, Path],
    photos: Path,
    balls: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prior = {"kind": "class_images", "count": 3, "steps": 1, "weight": 0.5, "caption_dropout": 0}
    recipe = two(tiny_bases["sd1"], photos, balls, data={"shape": shape}, prior=prior)
    looked, given = fitted(recipe, tmp_path / "run", monkeypatch)
    batches: Batches = given["batches"]
    one, other = (subject.token for subject in looked.subjects)
    steps = [batches.micro(step, 0) for step in range(30)]  # 6 epochs of 5 photos, 5 of 6 class images
    wanted = dict.fromkeys([(f"{n}.png of {one}", f"a photo of {one} mug") for n in range(3)], 6)
    wanted |= {
        (f"0.png of {other}", f"a photo of {other} ball"): 6,
        (f"wide.png of {other}", f"{other} ball on grass"): 6,
    }
    assert Counter((batch.names[0], batch.prompts[0]) for batch in steps) == wanted
    classes = [
        (f"class image 0000{n}.png of {noun}", f"a photo of a {noun}") for n in range(3) for noun in ("mug", "ball")
    ]
    assert Counter((batch.names[1], batch.prompts[1]) for batch in steps) == dict.fromkeys(classes, 5)
    assert all(batch.weight.tolist() == [2, 1] for batch in steps)
    for sample in batches.streams[1]:
        manifest = json.loads((sample.crops[0].photo.path.parent / "manifest.json").read_text())
        assert [manifest["prompt"]] == sample.captions
    for sample, folder in zip(batches.streams[0], [photos] * 3 + [balls] * 2, strict=True):
        assert sample.crops[0].photo.path.parent == folder


def test_a_run_of_two_resumes_bit_for_bit(
    tiny_bases: dict[str, Path], photos: Path, balls: Path, tmp_path: Path
) -> None:
    run, unchecked = {"steps": 4, "checkpoint_every": 2}, {"verify": "off"}
    recipe = parse_recipe(two(tiny_bases["sd1"], photos, balls, run=run, export=unchecked))
    resumed_is_the_unbroken_run(recipe, tmp_path)


def test_frozen_base_holds_each_sample_to_its_own_class(
    tiny_bases: dict[str, Path], photos: Path, balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prior = {"kind": "frozen_base", "caption_dropout": 0}
    run = {"steps": 5, "batch_size": 2}
    recipe = two(tiny_bases["sd1"], photos, balls, prior=prior, run=run)
    _, given = fitted(recipe, tmp_path / "run", monkeypatch)
    (keep,) = given["step"].options.regularizers
    seen = Counter()
    for batch in (given["batches"].micro(step, 0) for step in range(5)):
        for caption, prompt in zip(batch.prompts, keep.prompts(batch), strict=True):
            assert prompt == ("a photo of a ball" if " ball" in caption else "a photo of a mug")
            seen[prompt] += 1
        assert given["step"].encode_prompts(keep.prompts(batch), None)  # both prompts are in the cache
    assert seen == {"a photo of a mug": 6, "a photo of a ball": 4}
    monkeypatch.undo()
    job.train(parse_recipe(recipe | {"run": {"steps": 2}}), tmp_path / "whole")


def test_one_subject_is_what_it_was(
    tiny_bases: dict[str, Path], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The streams, written out as one subject always had them; the class images under the same key."""
    recipe = settings(tiny_bases["sd1"], photos, LORA)
    looked, given = fitted(recipe, tmp_path / "run", monkeypatch)
    side, token = looked.resolution, looked.token
    subject = [
        Sample(
            make_crops(photo, (side, side), "center", 4, False, 0), [f"a photo of {token} mug"], 1.0, 0.0, f"{n}.png"
        )
        for n, photo in enumerate(scan(photos))
    ]
    prior = parse_recipe(recipe).prior
    assert isinstance(prior, ClassImages)
    classes = [
        Sample(
            make_crops(image, (side, side), "center", 1, True, 0),
            ["a photo of a mug"],
            1.0,
            0.25,
            f"class image {image.path.name}",
            role="class",
        )
        for image in class_images(looked.family, ClassSet(prior, "mug", side, looked.base_hash))
    ]
    batches = given["batches"]
    assert batches.streams == [subject, classes]
    assert isinstance(batches.sampler, ShuffleSampler)
    shown = list(plan_rows(plan(looked)))
    assert shown[:4] == ["base", "subject", "training prompts", "token"]
    assert not record_of(looked).subjects


def test_two_of_one_noun_share_class_images_and_the_class_prompt(
    tiny_bases: dict[str, Path], photos: Path, balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subjects = {"subjects": [{"photos": str(balls), "class_noun": "mug"}]}
    looked, given = fitted(two(tiny_bases["sd1"], photos, balls, data=subjects), tmp_path / "run", monkeypatch)
    assert len(given["batches"].streams[1]) == 2
    one, other = (subject.token for subject in looked.subjects)
    assert looked.sample_prompts() == [
        f"a photo of {one} mug",
        f"a photo of {other} mug",
        "a tree",
        "a photo of a mug",
    ]


def test_a_found_token_is_none_that_was_given(tiny_bases: dict[str, Path], photos: Path, balls: Path) -> None:
    alone = prepare(parse_recipe(settings(tiny_bases["sd1"], photos, LORA))).token
    subjects = {"subjects": [{"photos": str(balls), "class_noun": "ball", "token": alone}]}
    looked = prepare(parse_recipe(two(tiny_bases["sd1"], photos, balls, data=subjects)))
    assert looked.subjects[1].token == alone
    assert looked.token != alone


def test_masks_of_a_further_subject_are_found(
    tiny_bases: dict[str, Path], photos: Path, balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = Image.new("L", (48, 48))
    mask.paste(255, (0, 0, 24, 48))
    mask.save(balls / "0.mask.png")
    recipe = two(tiny_bases["sd1"], photos, balls, data={"masks": "auto"})
    _, given = fitted(recipe, tmp_path / "run", monkeypatch)
    batch = next(
        batch for step in range(5) if (batch := given["batches"].micro(step, 0)).prompts[0].endswith("ball")
        and batch.names[0].startswith("0.png")
    )  # fmt: skip
    assert batch.mask is not None
    shown = batch.mask[0, 0]
    width = shown.shape[1]
    assert shown[:, : width // 2 - 1].min() == 1
    assert shown[:, width // 2 + 1 :].max() == 0
    with pytest.raises(BadInput, match=r"photos: data\.masks is 'files' but there is no mask for 0\.png"):
        prepare(parse_recipe(two(tiny_bases["sd1"], photos, balls, data={"masks": "files"})))


def test_the_folder_is_named_once_and_whatever_the_sentence_quotes(
    tiny_bases: dict[str, Path], photos: Path, balls: Path
) -> None:
    """A caption that quotes a path names no folder; a missing folder names itself."""
    balls.joinpath("wide.txt").write_text(f"a {{noun}} as in {balls}")
    recipe = two(tiny_bases["sd1"], photos, balls)
    recipe["data"]["subjects"][0]["class_noun"] = None
    recipe["data"] |= {"class_noun": None, "templates": ["a {token}"]}
    recipe["sample"] |= {"prompts": ["a {token}"]}
    recipe["prior"] = {"kind": "none"}
    with pytest.raises(BadInput, match=rf"^in {re.escape(str(balls))}: the caption 'a {{noun}} as in"):
        prepare(parse_recipe(recipe))
    recipe["data"]["subjects"][0]["photos"] = str(balls / "none")
    with pytest.raises(BadInput, match=rf"^there is no folder {re.escape(str(balls / 'none'))}: "):
        prepare(parse_recipe(recipe))


def test_a_base_with_extra_inputs_is_refused(tiny_bases: dict[str, Path], photos: Path, balls: Path) -> None:
    recipe = two(tiny_bases["sd1"], photos, balls)
    recipe |= {"base": {"source": str(tiny_bases["sd1"]), "inputs": "inpaint"}, "method": {"kind": "full"}}
    with pytest.raises(BadInput, match=r"data\.subjects has further subjects but the base reads inpaint"):
        prepare(parse_recipe(recipe))


def test_a_photo_of_two_subjects_keeps_its_place_in_each(
    tiny_bases: dict[str, Path], photos: Path, balls: Path
) -> None:
    """One photo shows both: it lies in both folders, at another place, and the record has it twice."""
    shutil.copy(balls / "wide.png", photos / "00.png")
    job_now = prepare(parse_recipe(two(tiny_bases["sd1"], photos, balls)))
    recorded = inputs_of(job_now)
    assert inputs_of(in_order(job_now, recorded)) == recorded
    (balls / "0.png").rename(balls / "z.png")
    renamed = prepare(parse_recipe(two(tiny_bases["sd1"], photos, balls)))
    found = inputs_of(in_order(renamed, recorded))
    assert changes(recorded, found) == []


def test_photos_that_are_held_out_of_one_subject_were_not_trained_on(
    tiny_bases: dict[str, Path], photos: Path, balls: Path, tmp_path: Path
) -> None:
    """Both have a photo 0.png: `finetune evaluate` tells them apart by their subject."""
    held_out, run = {"hold_out": 1}, {"steps": 2, "verdicts": "on"}
    looked = prepare(parse_recipe(two(tiny_bases["sd1"], photos, balls, data=held_out, run=run)))
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    (folder.path / "recipe.yaml").touch()
    folder.write_info(record_of(looked))
    write_inputs(folder.path, InputsRecord(inputs=inputs_of(looked)))
    source = Trained(folder.path, "run", Called("zwx", "mug"), "")
    unseen = held_out_photos(looked)
    for number, photo in enumerate(looked.photos):
        assert photos_trained_on(source, [photo.digest]) == (number not in unseen)
