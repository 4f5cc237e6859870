"""What is measured of one model of the tiny base: the subject, its details, new places, its class and the rest.

Used by dreambooth_claims.py. The judge (examples/tiny_base/judge.py) reads every detail of an image. It was trained on
renders only, and has one threshold for all subjects.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "tiny_base"))

import judge  # noqa: E402
from captions import PLACE_PHRASES, full_caption  # noqa: E402
from evaluate import right  # noqa: E402
from looks import EVERY, PHOTO_PLACES, Facts, random_facts, subject_photos, subject_picture  # noqa: E402
from places import PLACES  # noqa: E402
from shapes import CLASSES  # noqa: E402

from data_tools.mask import mask  # noqa: E402
from finetune.data.decoding import open_image  # noqa: E402
from finetune.families.base import Family  # noqa: E402
from finetune.sampling.draw import draw  # noqa: E402
from finetune.sampling.images import grid  # noqa: E402
from finetune.sampling.settings import Sampling  # noqa: E402
from finetune.verdicts.memorisation import memorised, photo_latents  # noqa: E402

UNSEEN = tuple(place for place in PLACES if place not in PHOTO_PLACES)
SAMPLING = Sampling(steps=20, guidance=5.0, batch_size=12)
COUNT, AT_PLACE, OWN, EACH_OTHER = 24, 12, 12, 4  # images: of a prompt, of a place, captions of a class
ACROSS = 6  # images in a row of a stored sheet
Pictures = list[Image.Image]
Sets = dict[str, Pictures]
Figures = dict[str, float]


def kind_of(subject: str) -> str:
    return EVERY[subject].kind


def photos_of(subject: str, work: Path) -> Path:
    """Writes five photos of a subject that the base has never seen."""
    folder = work / "photos" / subject
    if not folder.is_dir():
        subject_photos(subject, folder)
    return folder


def masked(photos: Path) -> Path:
    """Copies photos to a new folder, each with the mask that `finetune data mask` finds."""
    folder = photos.with_name(f"{photos.name}-masked")
    if not folder.is_dir():
        mask(photos, folder)
    return folder


def captioned(kinds: Sequence[str], each: int) -> list[Facts]:
    """The first `each` things of every kind that a fixed seed gives, without names: the base knows their words."""
    rng, found = np.random.default_rng(31), {kind: [] for kind in kinds}
    while any(len(own) < each for own in found.values()):
        facts = random_facts(rng)
        if facts.kind in found and len(found[facts.kind]) < each:
            found[facts.kind].append(facts)
    return [facts for own in found.values() for facts in own]


@dataclass(frozen=True)
class Drawn:
    """What is drawn of one model. `thing`: the words that call the subject, as its captions have them:
    "zwx mug", or a new word alone."""

    kind: str
    thing: str
    seed: int
    family: Family

    def of(self, prompts: Sequence[str], first: int) -> Pictures:
        seeds = [100_000 * (1 + self.seed) + first + number for number in range(len(prompts))]
        return draw(self.family, list(prompts), SAMPLING, seeds=seeds)

    def sets(self) -> Sets:
        """The images by the name of their set: of the subject, of its class, of the empty prompt, at each unseen
        place, and of full captions of the subject's class and of all others."""
        sets = {
            "own": self.of([f"a photo of {self.thing}"] * COUNT, 0),
            "plain": self.of([f"a photo of a {self.kind}"] * COUNT, 1000),
            "empty": self.of([""] * COUNT, 2000),
        }
        for k, place in enumerate(UNSEEN):
            sets[place] = self.of([f"a photo of {self.thing} {PLACE_PHRASES[place]}"] * AT_PLACE, 3000 + 100 * k)
        for (name, facts), first in zip(asked(self.kind).items(), (4000, 5000), strict=True):
            sets[name] = self.of([full_caption(one) for one in facts], first)
        return sets


def asked(kind: str) -> dict[str, list[Facts]]:
    """What full captions ask for: things of the subject's class, and of all others."""
    others = [other for other in CLASSES if other != kind]
    return {"own class": captioned([kind], OWN), "others": captioned(others, EACH_OTHER)}


def save(sets: Sets, folder: Path) -> None:
    """Writes each set as one lossless sheet."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, images in sets.items():
        grid(images, ACROSS).save(folder / f"{name}.png")


def load(folder: Path, kind: str) -> Sets:
    """Reads what `save` wrote."""
    counts = {"own": COUNT, "plain": COUNT, "empty": COUNT} | dict.fromkeys(UNSEEN, AT_PLACE)
    counts |= {name: len(facts) for name, facts in asked(kind).items()}
    sets = {}
    for name, count in counts.items():
        page = Image.open(folder / f"{name}.png").convert("RGB")
        side = page.width // ACROSS
        corners = [(k % ACROSS * side, k // ACROSS * side) for k in range(count)]
        sets[name] = [page.crop((x, y, x + side, y + side)) for x, y in corners]
    return sets


def measure(sets: Sets, subject: str) -> Figures:
    """The judge's ratings of one model's images. Shares are of images; `likeness` is a mean, see judge.closeness."""
    model, look, limit = judge.load_judge(), EVERY[subject], judge.threshold()
    seen = {name: judge.look_at(model, images) for name, images in sets.items()}

    def likeness(name: str) -> float:
        return _mean([judge.closeness(look, one, limit) for one in seen[name]])

    def shown(name: str) -> float:
        return _mean([judge.distance(look, one) <= limit for one in seen[name]])

    figures = {
        "likeness": likeness("own"),
        "details": _mean([off <= limit for one in seen["own"] for off in judge.details(look, one).values()]),
        "is_subject": shown("own"),
        "class_likeness": likeness("plain"),
        "class_is_subject": shown("plain"),
        "diversity": judge.diversity(model, sets["plain"]),
    }
    for place in UNSEEN:
        figures[f"at_{place}"] = _mean([one.word("place") == place for one in seen[place]])
        figures[f"subject_at_{place}"] = shown(place)
        figures[f"likeness_at_{place}"] = likeness(place)
    for name, column in (("own class", "own"), ("others", "others")):
        facts = asked(kind_of(subject))[name]
        found = [right(one, what) for one, what in zip(facts, seen[name], strict=True)]
        figures[f"{column}_right"] = _mean([all(one.values()) for one in found])
        figures[f"{column}_attributes"] = _mean([value for one in found for value in one.values()])
    kinds = [one.word("kind") for one in seen["empty"]]
    return figures | {f"empty_{kind}": kinds.count(kind) / COUNT for kind in CLASSES}


def copies(own: Pictures, photos: Path, family: Family) -> float:
    """The share of images of the subject that are near copies of a training photo, as a run's verdict counts them."""
    shown = [image.convert("RGB") for image in own]
    taken = [open_image(file).convert("RGB").resize(shown[0].size) for file in sorted(photos.glob("*.png"))]
    drawn, held = (photo_latents((image, _encoded(family, image)) for image in each) for each in (shown, taken))
    return memorised([str(number) for number in range(len(shown))], drawn, held).copies / len(shown)


@torch.no_grad()
def _encoded(family: Family, image: Image.Image) -> Tensor:
    """Latents [C, h, w]."""
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    return family.codec.encode(pixels).mean[0]


def real_figures(subject: str, family: Family) -> Figures:
    """The same ratings of renders of the subject itself: what can be reached. Those of a place, and "kept", are read
    after the base's VAE: no training brings back what it loses."""
    model, look, limit = judge.load_judge(), EVERY[subject], judge.threshold()
    real = [subject_picture(subject, 500 + number) for number in range(40)]
    seen = judge.look_at(model, real)

    def kept(images: Pictures) -> float:
        after = judge.look_at(model, [_through(family, image) for image in images])
        return _mean([judge.distance(look, one) <= limit for one in after])

    figures = {
        "real_likeness": _mean([judge.closeness(look, one, limit) for one in seen]),
        "real_details": _mean([off <= limit for one in seen for off in judge.details(look, one).values()]),
        "real_is_subject": _mean([judge.distance(look, one) <= limit for one in seen]),
        "kept_is_subject": kept(real),
    }
    for place in UNSEEN:
        figures[f"kept_at_{place}"] = kept([subject_picture(subject, 600 + number, place) for number in range(24)])
    return figures


@torch.no_grad()
def _through(family: Family, image: Image.Image) -> Image.Image:
    """The image after the VAE, encoded and decoded."""
    pixels = family.codec.decode(_encoded(family, image)[None])[0]
    return Image.fromarray(((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


# the columns of the table, and those of the short one
COLUMNS = (
    "gain", "details right", "is the subject",
    *(f"{place}: {what}" for place in UNSEEN for what in ("drawn", "the subject")),
    "“a noun” is the subject", "own class", "others", "“” own class", "“” own class, more than the base", "diversity",
    "copies", "CPU-s",
)  # fmt: skip
SHORT = (
    "gain", "details right", "is the subject", "there", "“a noun” is the subject", "own class", "others",
    "“” own class, more than the base", "diversity", "CPU-s",
)  # fmt: skip


def derive(row: dict[str, Any], base: dict[str, Any]) -> Figures:
    """The columns of the tables, from a run's figures and those of the untouched base at the same seeds.

    "there" is the mean over the four unseen places of "PLACE: the subject".
    """

    def gain(key: str) -> float:
        return (row[key] - base["class_likeness"]) / (row["real_likeness"] - base["class_likeness"])

    own_kind = f"empty_{kind_of(row['subject'])}"
    found = {"gain": gain("likeness"), "details right": row["details"], "is the subject": row["is_subject"]}
    for place in UNSEEN:
        found |= {f"{place}: drawn": row[f"at_{place}"], f"{place}: the subject": row[f"subject_at_{place}"]}
    found["there"] = _mean([row[f"subject_at_{place}"] for place in UNSEEN])
    for place in UNSEEN:
        found[f"{place}: the subject, real"] = base[f"kept_at_{place}"]
    return found | {
        "“a noun” is the subject": row["class_is_subject"],
        "own class": _ratio(row["own_right"], base["own_right"]),
        "others": _ratio(row["others_right"], base["others_right"]),
        "“” own class": row[own_kind],
        "“” own class, more than the base": row[own_kind] - base[own_kind],
        "diversity": _ratio(row["diversity"], base["diversity"]),
        "copies": row.get("copies", 0.0),
        "CPU-s": row["cpu_seconds"],
    }


def _ratio(value: float, reference: float) -> float:
    return value / reference if reference else float("nan")


def _mean(values: Sequence[float] | Sequence[bool]) -> float:
    return float(np.mean(values))
