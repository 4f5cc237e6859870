"""Tags in drawn orders, several captions a photo, repeats and weights: what is drawn, what the plan says, resume."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from ends import resumed_is_the_unbroken_run

from finetune.config.load import parse_recipe
from finetune.core.batch import Latents
from finetune.core.errors import BadInput
from finetune.core.rng import SampleKey
from finetune.data.batches import Batches, drawn_choice
from finetune.data.mixes import by_pattern, mix_captions, tag_orders
from finetune.data.photos import scan
from finetune.data.samplers import BucketSampler, Sample, ShuffleSampler
from finetune.jobs.dataset import make_streams
from finetune.jobs.drawn import drawn_captions
from finetune.jobs.plan import plan
from finetune.jobs.prepare import prepare
from finetune.runs.plan import plan_rows


def recipe(base: Path, photos: Path, data: dict[str, Any], **run: Any) -> Any:
    return parse_recipe(
        {
            "base": str(base),
            "data": {"photos": str(photos), "class_noun": "mug", "token": "sks", "resolution": 16, **data},
            "method": {"kind": "lora", "rank": 2},
            "optim": {"kind": "adamw", "lr": 1e-2},
            "run": {"steps": 12, "batch_size": 2, "verdicts": "off", **run},
            "sample": {"prompts": ["a {token}"], "count": 1, "steps": 1},
        }
    )


@pytest.fixture
def tagged(photos: Path) -> Path:
    """Three photos with tags, of which two have a caption of a model too."""
    for number in range(3):
        (photos / f"{number}.txt").write_text(f"sks, mug, red, n{number}, on a table")
    for number in range(2):
        (photos / f"{number}.blip.txt").write_text(f"a sks mug, number {number}")
    return photos


def test_orders_keep_the_first_tags_the_trigger_and_every_tag() -> None:
    text = "sks,  red hair, (smile:1.1), tree in sks style"
    orders = tag_orders(text, 1, 60, 3, "in sks style")
    assert len(set(orders)) == 6
    assert min(Counter(orders).values()) >= 3
    for order in orders:
        assert order.startswith("sks, ")
        assert order.endswith(" in sks style")
        body = order.removesuffix(" in sks style").split(", ")
        assert sorted(body) == ["(smile:1.1)", "red hair", "sks", "tree"]
    assert tag_orders(text, 1, 60, 3, "in sks style") == orders != tag_orders(text, 1, 60, 4, "in sks style")
    assert tag_orders("sks, red", 1, 9, 0) == ["sks, red"]


def test_captions_are_drawn_by_their_shares() -> None:
    sample = Sample([], ["a", "b", "c"], 1.0, 0.0, "x", shares=(1.0, 6.0, 3.0))
    crops: list[Any] = [None]
    texts = Counter(drawn_choice(sample, crops, SampleKey(5, step, 0))[1] for step in range(2000))
    assert [round(texts[name] / 2000, 1) for name in "abc"] == [0.1, 0.6, 0.3]


def test_a_mix_is_of_files_columns_and_templates(tagged: Path) -> None:
    rows = [{"file_name": "2.png", "text": "sks, mug, red, n2, on a table", "florence": "two  words"}]
    (tagged / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    photos = scan(tagged)
    mix = {"own": 1.0, "blip": 2.0, "florence": 3.0, "templates": 4.0}
    parts = mix_captions(tagged, photos, mix, ["one", "two"])
    first = [("sks, mug, red, n0, on a table", 1.0), ("a sks mug, number 0", 2.0), ("one", 2.0), ("two", 2.0)]
    assert parts[0] == first
    assert parts[2] == [("sks, mug, red, n2, on a table", 1.0), ("two words", 3.0), ("one", 2.0), ("two", 2.0)]
    with pytest.raises(BadInput, match="'git'"):
        mix_captions(tagged, photos, {"own": 1, "git": 1}, [])
    with pytest.raises(BadInput, match=r"2\.png of .* have no caption"):
        mix_captions(tagged, photos, {"blip": 1}, [])


def test_the_first_pattern_that_fits_counts() -> None:
    names = ["close-1.jpg", "close-2.jpg", "far.jpg"]
    assert by_pattern({"close-1*": 3, "close*": 2}, names, 1, "data.repeats") == [3, 2, 1]
    with pytest.raises(BadInput, match=r"data\.repeats has 'near\*'"):
        by_pattern({"near*": 2}, names, 1, "data.repeats")


DRAWS = {
    "shuffle_tags": True, "keep_tags": 1, "caption_mix": {"own": 3, "blip": 1}, "repeats": {"1.*": 3},
    "weights": {"2.png": 0.5}, "caption_dropout": 0.2,
}  # fmt: skip


@pytest.mark.parametrize("shape", ["square", "buckets"])
def test_the_plan_says_what_the_run_draws(shape: str, tiny_bases: dict[str, Path], tagged: Path) -> None:
    """Its lines are those of the real batches, in which class images and everything else have places too."""
    made = prepare(recipe(tiny_bases["sd1"], tagged, DRAWS | {"shape": shape}, steps=20))
    streams = make_streams(made)
    assert Counter(sample.name for sample in streams[0]) == {"0.png": 1, "1.png": 3, "2.png": 1}
    assert {sample.name: sample.weight for sample in streams[0]} == {"0.png": 1, "1.png": 1, "2.png": 0.5}
    kind = BucketSampler if shape == "buckets" else ShuffleSampler
    batches = Batches(kind(streams, 0, 2), Nothing())  # type: ignore[arg-type]
    seen: dict[str, list[str]] = {name: [] for name in made.names}
    for step in range(20):
        batch = batches.micro(step, 0)
        for name, text, weight in zip(batch.names, batch.prompts, batch.weight.tolist(), strict=True):
            if weight:
                seen[name].append(f"step {step + 1} {text!r}")
    expected = [f"{name}: {'; '.join(texts[:5])}" for name, texts in seen.items()]
    assert drawn_captions(made) == expected
    rows = plan_rows(plan(made))
    assert rows["captions drawn"] == expected
    assert rows["emphasis"] == [
        "1 seen 1 times an epoch, with weight 0.5 (2.png)",
        "1 seen 1 times an epoch, with weight 1 (0.png)",
        "1 seen 3 times an epoch, with weight 1 (1.png)",
    ]
    assert "0.blip.txt" not in str(rows.get("not used"))


class Nothing:
    """Latents of nothing."""

    def latents(self, crop: Any) -> Latents:
        return Latents(torch.zeros(4, 2, 2), torch.zeros(4, 2, 2))

    def conditions(self, crop: Any) -> dict[str, torch.Tensor]:
        return {}


def test_without_draws_the_plan_says_nothing_of_them(tiny_bases: dict[str, Path], tagged: Path) -> None:
    made = prepare(recipe(tiny_bases["sd1"], tagged, {}))
    rows = plan_rows(plan(made))
    assert not {"captions drawn", "emphasis"} & set(rows)


def test_a_run_that_draws_resumes_bit_for_bit(tiny_bases: dict[str, Path], tagged: Path, tmp_path: Path) -> None:
    resumed_is_the_unbroken_run(recipe(tiny_bases["sd1"], tagged, DRAWS, steps=4, checkpoint_every=2), tmp_path)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"keep_tags": 2}, "data.keep_tags"),
        ({"tag_orders": 4}, "data.tag_orders"),
        ({"caption_mix": {"own": 1}, "captions": "templates"}, "data.caption_mix"),
        ({"caption_mix": {"a b": 1}}, "caption_mix"),
        ({"caption_mix": {"own": 0}}, "caption_mix"),
        ({"repeats": 5}, "data.repeats is 5 for every photo"),
        ({"repeats": 0}, "repeats"),
        ({"weights": {"*": -1}}, "weights"),
    ],
)
def test_draws_without_effect_are_refused_by_name(data: dict, words: str, photos: Path) -> None:
    with pytest.raises(BadInput, match=words.replace(".", r"\.")):
        recipe(Path("tiny"), photos, data)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"shuffle_tags": True, "keep_tags": 4}, "data.shuffle_tags is on but no caption"),
        ({"repeats": {"9*": 2}}, "data.repeats has '9\\*'"),
        ({"weights": {"*": 0}}, "the weight 0"),
        ({"caption_mix": {"own": 1, "git": 1}}, "'git'"),
    ],
)
def test_draws_that_the_photos_do_not_allow_are_refused(
    data: dict, words: str, tiny_bases: dict[str, Path], tagged: Path
) -> None:
    with pytest.raises(BadInput, match=words):
        prepare(recipe(tiny_bases["sd1"], tagged, data))
