"""Images of everything else in a run: what they are drawn for, who shares them, and a run that is trained on them."""

from __future__ import annotations

import json
import re
import shutil
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from ends import resumed_is
from test_train import LORA, SHORT, settings

from finetune.config.load import changed_recipe, dump_recipe, load_recipe, parse_recipe
from finetune.core.errors import BadInput
from finetune.core.events import sent_to
from finetune.core.files import sha256
from finetune.data.cache import LatentCache
from finetune.families.digests import base_hash
from finetune.families.source import load_family, resolve_base
from finetune.jobs import train as job
from finetune.jobs.class_sets import OtherSet, class_images
from finetune.jobs.dataset import make_batches, make_streams
from finetune.jobs.estimate import estimate
from finetune.jobs.fit import fit_job
from finetune.jobs.neutral import other_prompts
from finetune.jobs.plan import plan
from finetune.jobs.prepare import Prepared, other_set, prepare
from finetune.runs.folder import RunFolder
from finetune.runs.inputs import read_inputs
from finetune.runs.metrics import MetricsFile
from finetune.runs.plan import plan_rows
from finetune.testing.kill import killed_at
from finetune.training.accelerate import make_accelerator
from finetune.training.priors.class_images import ClassImages
from finetune.training.priors.others import Others
from finetune.training.priors.registry import PRIORS
from finetune.verdicts.due import samples_in_step

EXAMPLES = Path(__file__).parents[2] / "examples" / "tiny_base"
FEW = {"count": 5, "steps": 1, "batch_size": 2, "empty": 0.4, "prompts": ["a red car", "two dogs", "the sea"]}
NOT_CHECKED = {"export": {"verify": "off"}}


def recipe_values(base: Path, photos: Path, others: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    prior = {"kind": "none", "others": FEW | (others or {})} | sections.pop("prior", {})
    data = {"photos": str(photos), "class_noun": "mug", "token": "zwx"} | sections.pop("data", {})
    method = sections.pop("method", LORA)
    return settings(base, photos, method, prior=prior, data=data, **NOT_CHECKED, **sections)


def looked_at(*given: Any, **sections: Any) -> Prepared:
    return prepare(parse_recipe(recipe_values(*given, **sections)))


def drawn_for(count: int, **more: Any) -> list[str]:
    wanted = OtherSet(ClassImages(count=count), "", 32, "hash", captions=("a", "b", "c"), **more)
    return [wanted.prompt_of(number) for number in range(count)]


def test_prompts_in_turn_and_the_empty_one_in_between() -> None:
    assert drawn_for(7) == ["a", "b", "c", "a", "b", "c", "a"]
    assert drawn_for(8, empty=0.25) == ["a", "b", "c", "", "a", "b", "c", ""]
    assert drawn_for(3, empty=1.0) == ["", "", ""]
    assert drawn_for(256, empty=0.15).count("") == 38
    assert drawn_for(20, empty=0.15) == drawn_for(40, empty=0.15)[:20]


def test_a_larger_set_keeps_the_images_of_the_smaller_one(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, found = load_family(str(tiny_bases["sd1"])), {}
    for cache, counts in (("grown", (2, 5)), ("whole", (5,))):
        monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / cache))
        for count in counts:
            prior = Others(**FEW | {"count": count}).drawn_as
            wanted = OtherSet(prior, "", 32, "hash", captions=("a", "b"), empty=0.4)
            found[cache, count] = [photo.digest for photo in class_images(family, wanted)]
    assert found["grown", 2] == found["grown", 5][:2]
    assert found["grown", 5] == found["whole", 5]
    (folder,) = (tmp_path / "grown" / "class-images").iterdir()
    made = json.loads((folder / "manifest.json").read_text())
    assert folder.name.startswith("others-")
    assert (made["prompts"], made["empty"], len(made["pictures"])) == (["a", "b"], 0.4, 5)


def test_every_run_with_a_base_and_a_resolution_has_one_set(tiny_bases: dict[str, Path], photos: Path) -> None:
    """Noun, token, kind of prior, number and weight do not matter; the base, the size and the prompts do."""

    def folder(base: str = "sd1", others: dict[str, Any] | None = None, **sections: Any) -> Path:
        wanted = other_set(looked_at(tiny_bases[base], photos, others, **sections))
        assert wanted is not None
        return wanted.folder

    one = folder()
    assert folder(data={"class_noun": "dog", "token": "auto"}) == one
    assert folder(prior={"kind": "frozen_base"}) == one
    assert folder(others={"count": 3, "weight": 2.0, "share": 0.5, "target": "base"}) == one
    changed = [folder("sd2"), folder(data={"resolution": 64}), folder(others={"prompts": ["x"]})]
    changed += [folder(others={"empty": 0.2}), folder(others={"guidance": 2.0})]
    assert len({one, *changed}) == 6


def test_streams_roles_weights_and_captions(tiny_bases: dict[str, Path], photos: Path) -> None:
    looked = looked_at(
        tiny_bases["sd1"], photos, {"weight": 0.7}, prior={"kind": "class_images", "count": 2, "steps": 1, "weight": 3}
    )
    photo, classes, others = make_streams(looked)
    assert [len(photo), len(classes), len(others)] == [3, 2, 5]
    assert {sample.role for sample in classes} == {"class"}
    assert {(sample.role, sample.weight, sample.caption_dropout) for sample in others} == {("other", 0.7, 0.0)}
    assert [sample.captions for sample in others] == [["a red car"], ["two dogs"], [""], ["the sea"], [""]]
    assert [stream[0].role for stream in make_streams(looked_at(tiny_bases["sd1"], photos))] == ["photo", "other"]


def test_no_image_of_a_prompt_with_the_token(tiny_bases: dict[str, Path], photos: Path) -> None:
    """As a word of its own, in any case; the set itself stays that of all runs."""
    prompts = {"prompts": ["a ZWX car", "zwxes", "the sea"], "empty": 0}
    looked = looked_at(tiny_bases["sd1"], photos, prompts)
    assert [sample.captions[0] for sample in make_streams(looked)[1]] == ["zwxes", "the sea", "zwxes"]
    assert "3 images of the base for 2 prompts" in plan_rows(plan(looked))["everything else"]
    assert "2 more name the token" in plan_rows(plan(looked))["everything else"]
    with pytest.raises(BadInput, match=r"every prompt of prior\.others has the token"):
        looked_at(tiny_bases["sd1"], photos, {"prompts": ["a zwx"], "empty": 0})


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({"count": 0}, r"prior\.others\.count is 0: give at least 1"),
        ({"weight": 0}, r"prior\.others\.weight is 0: give more than 0"),
        ({"share": 1.5}, r"prior\.others\.share is 1\.5"),
        ({"prompts": "nowhere.txt"}, r"prior\.others\.prompts is '.*nowhere\.txt', which is no file"),
        ({"prompts": []}, r"prior\.others\.prompts has no prompts"),
        ({"prompts": ["a", " "]}, r"prior\.others\.prompts has an empty text"),
        ({"prompts": ["a {token} on the beach"]}, r"has '\{token\}' \('a \{token\} on the beach'\), but these images"),
        ({"prompts": ["a {noun}"]}, r"has '\{noun\}'"),
        ({"sampler": "ddim"}, "the sampler 'ddim' is for diffusion"),
    ],
)
def test_what_can_not_be_is_refused(
    others: dict[str, Any], said: str, tiny_bases: dict[str, Path], photos: Path
) -> None:
    with pytest.raises(BadInput, match=said):
        looked_at(tiny_bases["flux" if "sampler" in others else "sd1"], photos, others)


def test_a_method_that_trains_only_a_word_has_nothing_to_keep() -> None:
    with pytest.raises(BadInput, match=r"prior\.others is given but method\.kind textual_inversion trains only"):
        load_recipe(
            "textual-inversion",
            {"data.photos": "x", "data.class_noun": "mug", "prior": {"kind": "none", "others": {}}},
        )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has no prompts"),
        (b"# only a comment\n\n", "has no prompts"),
        (b"a dog\n a {token} \n", r"prompts\.txt\) has '\{token\}'"),
        (b"caf\xe9", "is not UTF-8"),
        (b"a" * 1_000_001, "is larger than 1 MB"),
    ],
)
def test_a_file_that_is_no_list_is_refused(content: bytes, said: str, photos: Path, tmp_path: Path) -> None:
    """Before a base of gigabytes is loaded: there is none."""
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(BadInput, match=said):
        looked_at(tmp_path / "no base", photos, {"prompts": str(tmp_path / "prompts.txt")})


def test_a_base_that_reads_more_than_latents_is_refused(wide_bases: dict[tuple[str, str], Path], photos: Path) -> None:
    with pytest.raises(BadInput, match=r"prior\.others is given but the base reads edit inputs"):
        looked_at(wide_bases["sd1", "edit"], photos)


def test_whose_prompts(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """The recipe's, else the base's own file, which counts as one of the base's, else the included list."""
    base = shutil.copytree(tiny_bases["sd1"], tmp_path / "base")
    assert "included list" in other_prompts(Others(), base).origin
    before = base_hash(base)
    (base / "neutral_prompts.txt").write_text("# ours\na hat\n\na hat\n a coat \n", encoding="utf-8")
    assert other_prompts(Others(), base).texts == ("a hat", "a coat")
    assert base_hash(base) != before
    (tmp_path / "own.txt").write_text("\ufeffa boat\n", encoding="utf-8")
    assert other_prompts(Others(prompts=tmp_path / "own.txt"), base).texts == ("a boat",)
    assert other_prompts(Others(prompts=("a kite",)), base).texts == ("a kite",)


def test_the_included_list(tmp_path: Path) -> None:
    """Many and different."""
    general = other_prompts(Others(), tmp_path).texts
    assert len(general) >= 300
    assert all(re.fullmatch(r"[A-Za-z3' ,-]+", text) for text in general)
    assert len({text.split()[-1] for text in general[:218]}) > 150


def test_tinys_own_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its own words, without named things, and none is a combination that it never saw."""
    tiny = other_prompts(Others(), resolve_base("tiny")).texts
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    import captions
    import looks

    every = product(looks.CLASSES, looks.COLOURS, looks.PATTERNS, looks.PLACES)
    unseen = [looks.Facts(*four) for four in every if looks.held_out(looks.Facts(*four))]
    ends = {captions.full_caption(facts).removeprefix("a photo of a ") for facts in unseen}
    assert len(tiny) >= 300
    assert not [text for text in tiny if any(re.search(rf"(?<!and ){end}$", text) for end in ends)]
    words = {word for text in tiny for word in text.split()}
    assert not words & set(looks.NAMES)
    assert {"star", "hat", "dotted", "snow", "and"} <= words


def test_off_by_default_and_kept_when_the_kind_changes() -> None:
    values = {"data": {"photos": "x", "class_noun": "mug"}, "method": LORA, "optim": {"kind": "adamw"}}
    for kind in PRIORS:
        recipe = parse_recipe(values | {"prior": {"kind": kind}})
        assert recipe.prior.others is None
        assert changed_recipe(recipe, ["prior.others.count=7"]).prior.others == Others(count=7)
        both = ["prior.kind=none", "prior.others={}", f"prior.kind={kind}"]
        assert parse_recipe(values, both).prior.others == Others()
    subject = {"data.photos": "x", "data.class_noun": "x"}
    assert (
        load_recipe("dreambooth-lora", {**subject, "base": "stable-diffusion-v1-5/stable-diffusion-v1-5"}).prior.others
        is None
    )
    assert load_recipe("dreambooth-lora", {**subject, "base": "tiny"}).prior.others == Others(
        guidance=3.0, steps=12, share=0.5
    )
    assert "others: null" in dump_recipe(recipe)


@pytest.mark.parametrize(
    ("prior", "others", "slower"),
    [
        ("none", {}, "100%"),
        ("class_images", {}, "50%"),
        ("class_images", {"share": 0.5}, "25%"),
        ("class_images", {"target": "base"}, "67%"),
        ("frozen_base", {}, "43%"),
    ],
)
def test_the_plan_says_what_it_costs(
    prior: str, others: dict[str, Any], slower: str, tiny_bases: dict[str, Path], photos: Path
) -> None:
    looked = looked_at(tiny_bases["sd1"], photos, others, prior={"kind": prior})
    line = plan_rows(plan(looked))["everything else"]
    assert "5 images of the base for 3 prompts of the recipe, 2 of them for the empty prompt" in line
    assert line.endswith(f"about {slower} more time per step")
    assert ("frozen base teaches" in line) == ("target" in others)


@pytest.mark.parametrize(("target", "slower"), [("images", "50%"), ("base", "43%")])
def test_class_images_that_the_base_teaches(
    target: str, slower: str, tiny_bases: dict[str, Path], photos: Path
) -> None:
    """2 passes of a step become 2 1/3, which others then make 1 / (2 1/3) slower."""
    looked = looked_at(tiny_bases["sd1"], photos, {}, prior={"kind": "class_images", "target": target})
    rows = plan_rows(plan(looked))
    assert rows["class images"].endswith(", which the frozen base teaches") == (target == "base")
    assert rows["everything else"].endswith(f"about {slower} more time per step")


@pytest.mark.parametrize("others", [None, {"share": 0.25}])
def test_class_images_may_be_fewer_than_photos(
    others: dict[str, Any] | None, tiny_bases: dict[str, Path], photos: Path
) -> None:
    """Which stream has which share; the plan and the cost of a step say it."""
    prior = {"kind": "class_images", "count": 4, "steps": 1, "batch_size": 2, "share": 0.5}
    values = recipe_values(tiny_bases["sd1"], photos, others, prior=prior, run=SHORT | {"batch_size": 4})
    if others is None:
        del values["prior"]["others"]
    looked = prepare(parse_recipe(values))
    streams = make_streams(looked)
    sampler = make_batches(looked, streams, LatentCache.__new__(LatentCache)).sampler
    roles = {stream[0].role: number for number, stream in enumerate(streams)}
    counts = {role: sum(sampler.has(number, 0, pair) for pair in range(4)) for role, number in roles.items()}
    assert counts == {"photo": 4, "class": 2} | ({"other": 1} if others else {})
    assert "each seen 1.0 times, 0.5 for each photo of a step" in plan_rows(plan(looked))["class images"]
    assert looked.recipe.prior.passes == 1.5
    assert samples_in_step(looked.recipe.run, looked.recipe.prior) == sum(counts.values())


def test_the_estimate_counts_it(tiny_bases: dict[str, Path], photos: Path) -> None:
    """The samples' activations, and the copy of the base that teaches a full training."""
    full = settings(tiny_bases["sd1"], photos, {"kind": "full"}, prior={"kind": "none"}, run=SHORT | {"batch_size": 4})
    plain, half, whole, taught, classes = (
        estimate(parse_recipe(full, more))
        for more in (
            [],
            ["prior.others.share=0.5"],
            ["prior.others={}"],
            ["prior.others.target=base"],
            ["prior.kind=class_images", "prior.share=0.5"],
        )
    )
    assert classes.activations == pytest.approx(1.5 * plain.activations, rel=0.05)
    assert whole.activations == pytest.approx(2 * plain.activations, rel=0.05)
    assert half.activations == pytest.approx(1.5 * plain.activations, rel=0.05)
    assert plain.held == whole.held < taught.held


def test_a_run_that_goes_on_its_page_and_its_pins(tiny_bases: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    """Killed and resumed it ends as the unbroken one, bit for bit; with class images, in micro-batches."""
    values = recipe_values(
        tiny_bases["sd1"],
        photos,
        {"share": 0.75, "target": "base"},
        prior={"kind": "class_images", "count": 2, "steps": 1, "target": "base"},
        run={"steps": 4, "batch_size": 2, "accumulate": 2, "checkpoint_every": 1},
    )
    recipe, lines = parse_recipe(values), []
    whole = job.train(recipe, tmp_path / "whole", lines.append)
    resumed_is(whole, recipe, tmp_path / "stopped")
    assert any(line.split()[:2] == ["everything", "else"] for line in lines)
    page = (whole / "report.html").read_text(encoding="utf-8")
    assert "Everything else: 5 images that the base drew for diverse prompts" in page
    assert page.count('alt="image of everything else"') == 5
    assert page.count('alt="class image"') == 2
    recorded = read_inputs(whole)
    assert recorded is not None
    looked = prepare(recipe)
    wanted = other_set(looked)
    assert wanted is not None
    files = [wanted.folder / f"{number:05d}.png" for number in range(5)]
    assert recorded.inputs.others == [[wanted.prompt_of(n), sha256(file)] for n, file in enumerate(files)]
    assert list(recorded.inputs.class_images) == ["a photo of a mug"]
    with killed_at(3):
        job.train(recipe, tmp_path / "third")
    file = tmp_path / "third" / "inputs.json"
    file.write_text(file.read_text().replace(sha256(files[1]), "0" * 64))
    with pytest.raises(BadInput, match=r"1 of the images of everything else \(prior.others\) changed"):
        job.resume(tmp_path / "third")


def test_parts_of_unequal_size_make_the_step_of_the_whole_batch(
    tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    """Three of everything else beside four photos, in two micro-batches: the first step's loss and gradient."""
    rows = []
    for accumulate in (1, 2):
        values = recipe_values(
            tiny_bases["sd1"],
            photos,
            {"share": 0.75, "target": "base", "weight": 3.0},
            run={"steps": 1, "batch_size": 4, "accumulate": accumulate},
            method={"kind": "full"},
            prior={"kind": "none"},
        )
        looked, run = prepare(parse_recipe(values)), tmp_path / str(accumulate)
        run.mkdir()
        with sent_to(MetricsFile(run)):
            fit_job(looked, RunFolder(run), make_accelerator(looked.recipe.run, False))
        rows.append(json.loads((run / "metrics.jsonl").read_text()))
    assert rows[1]["loss"] == pytest.approx(rows[0]["loss"], rel=1e-5)
    assert rows[1]["grad_norm"] == pytest.approx(rows[0]["grad_norm"], rel=1e-4) != 0


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["square", "buckets"])
def test_beside_frozen_base_with_dropout_and_checkpointing(
    shape: str, tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    """Some samples of a batch are predicted twice, each with its own dropout, also when they are computed again."""
    values = recipe_values(
        tiny_bases["sd1"],
        photos,
        {"share": 0.5},
        prior={"kind": "frozen_base"},
        method=LORA | {"dropout": 0.2, "parts": ["denoiser", "text_encoders"]},
        data={"shape": shape},
        run={"steps": 4, "batch_size": 4, "checkpoint_every": 1, "gradient_checkpointing": True},
    )
    recipe = parse_recipe(values)
    whole = job.train(recipe, tmp_path / "whole")
    resumed_is(whole, recipe, tmp_path / "stopped")
    plain = job.train(changed_recipe(recipe, ["run.gradient_checkpointing=false"]), tmp_path / "plain")
    losses = [[json.loads(line)["loss"] for line in (run / "metrics.jsonl").open()] for run in (whole, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
