"""How much of a prompt's place the images of dreambooth_claims.py do not show, by the verdicts' own measure.

As a run measures it whose sample prompts are the four unseen places: four images of each, told by the base.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from claims_measure import UNSEEN, Drawn, Pictures, Sets
from PIL import Image

from finetune.data import tokens
from finetune.families.base import Family
from finetune.families.source import load_family
from finetune.jobs.ask_images import canvas_of, image_latents
from finetune.verdicts.adherence import CLASS, IMAGES, PromptShown, Question, helped
from finetune.verdicts.points import Predictor

from captions import PLACE_PHRASES  # isort: skip - examples/tiny_base, which claims_measure has put on the path


def lost_at(sets: Sets, kind: str, seed: int, work: Path) -> dict[str, float]:
    """Of each place that the base's images tell: the share of it that a model's images do not show."""
    base = load_family("tiny")
    before, asked = _of_base(kind, seed, base, work), _questions(kind)
    told = _told(base, [(image, asked[place]) for place in UNSEEN for image in sets[place][:IMAGES]])
    found = {}
    for number, place in enumerate(UNSEEN):
        after = told[IMAGES * number : IMAGES * (number + 1)]
        lost = PromptShown(before[place].own, before[place].others, after).lost
        if lost is not None:
            found[place] = round(lost, 4)
    return found


def _questions(kind: str) -> dict[str, Question]:
    plain = CLASS.format(noun=kind)
    return {place: Question(place, f"{plain} {PLACE_PHRASES[place]}", plain) for place in UNSEEN}


def _of_base(kind: str, seed: int, base: Family, work: Path) -> Mapping[str, PromptShown]:
    """What the base says of its own images, which are drawn once."""
    file = work / f"answers-{kind}-{seed}.json"
    if not file.is_file():
        thing = f"{tokens.suggest(base, 1, kind)[0].text} {kind}"
        drawn = Drawn(kind, thing, seed, base)
        images = {
            place: drawn.of([f"a photo of {thing} {PLACE_PHRASES[place]}"] * IMAGES, 3000 + 100 * number)
            for number, place in enumerate(UNSEEN)
        }
        images["plain"] = drawn.of([f"a photo of {thing}"] * IMAGES, 0)
        file.parent.mkdir(parents=True, exist_ok=True)
        values = {place: asdict(answer) for place, answer in _answers(base, kind, images).items()}
        file.write_text(json.dumps(values), encoding="utf-8", newline="\n")
    held = json.loads(file.read_text(encoding="utf-8"))
    return {place: PromptShown(**values) for place, values in held.items()}


def _answers(base: Family, kind: str, images: Mapping[str, Pictures]) -> dict[str, PromptShown]:
    found = {}
    for place, question in _questions(kind).items():
        others = [each[0] for name, each in images.items() if name != place][:IMAGES]  # one of each other prompt
        told = _told(base, [(image, question) for image in [*images[place], *others]])
        found[place] = PromptShown(told[:IMAGES], told[IMAGES:])
    return found


@torch.no_grad()
def _told(base: Family, pairs: Sequence[tuple[Image.Image, Question]]) -> list[float]:
    asked = [(image_latents(base, image.convert("RGB")), question) for image, question in pairs]
    return helped(Predictor(base, base.encode_prompts, 16), canvas_of(base, pairs[0][0].width), asked)
