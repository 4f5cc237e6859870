"""The judge: reads every detail of an image of the tiny world. train_judge.py trained it, only on renders.

It says what is there in words (class, pattern, place, logo, what is worn) and in colours (upper half, lower half, of
stripes or dots, of the logo). So likeness to a subject is no feeling for the whole image: each detail of the subject's
look is compared, and the worst one decides. An image "is" a subject if no detail is further off than the threshold in
judge.json, which is one number for all subjects.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from looks import COLOURS, PATTERNS
from PIL import Image
from places import PLACES
from safetensors.torch import load_file
from shapes import CLASSES, LOGOS, WORN, Colour
from torch import Tensor, nn
from world import PIXELS, Look, mark_of

NONE = "none"
LOGO = "logo"
UNIT = 0.3  # of colours: at this distance they are as far off as a word that is as likely as all others together
HEADS: dict[str, tuple[str, ...]] = {
    "kind": CLASSES,
    "pattern": PATTERNS,
    "place": PLACES,
    LOGO: (*LOGOS, NONE),
    "worn": (*WORN, NONE),
}
TONES = ("body", "second", "mark", "logo_colour")
WEIGHTS = Path(__file__).with_name("judge.safetensors")
ABOUT = Path(__file__).with_name("judge.json")


def _convolutions(*widths: int) -> list[nn.Module]:
    """Pairs of 3x3 convolutions, of which the first halves the sides."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(8, after), nn.SiLU()]
        layers += [nn.Conv2d(after, after, 3, 1, 1), nn.GroupNorm(8, after), nn.SiLU()]
    return layers


class Judge(nn.Module):
    """Two looks at a 128x128 RGB image in [-1, 1]: one at the whole, which says what is there and where the logo is or
    would be, and one at a window around that place, which reads the logo."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*_convolutions(3, 16, 32, 64, 96, 128))
        self.shared = nn.Sequential(nn.Linear(128 * 16, 384), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(384, len(words)) for name, words in HEADS.items() if name != LOGO})
        self.tones = nn.Linear(384, 3 * (len(TONES) - 1))
        self.where = nn.Linear(384, 3)
        first = [nn.Conv2d(3, 24, 3, 1, 1), nn.GroupNorm(8, 24), nn.SiLU()]
        self.window = nn.Sequential(*first, *_convolutions(24, 48, 64, 96), nn.Flatten(), nn.Linear(96 * 16, 192))
        self.logo = nn.Linear(192, len(HEADS[LOGO]))
        self.logo_colour = nn.Linear(192, 3)

    def features(self, pixels: Tensor) -> Tensor:
        """[B, 384]"""
        seen: Tensor = self.shared(self.body(pixels.contiguous(memory_format=torch.channels_last)).flatten(1))
        return seen

    def forward(self, pixels: Tensor, place: Tensor | None = None) -> Reading:
        """`place` [B, 3]: where the windows are (see `Reading`); NaN or None: where the judge itself sees the logo."""
        hidden = self.features(pixels)
        where = self.where(hidden)
        seen = where.detach().float()
        at = seen if place is None else torch.where(place.isnan(), seen, place)
        near = F.silu(self.window(_cut(pixels, at)))
        words = {name: head(hidden) for name, head in self.heads.items()} | {LOGO: self.logo(near)}
        tones = 0.5 + torch.cat([self.tones(hidden), self.logo_colour(near)], 1)
        return Reading(words, tones.unflatten(1, (len(TONES), 3)), where)


@dataclass(frozen=True)
class Reading:
    """Logits [B, words] of each head, colours [B, 4, 3] from 0 to 1, and the logo's place [B, 3]: x, y and radius,
    from -1 to 1 over the image."""

    words: dict[str, Tensor]
    tones: Tensor
    where: Tensor


def _cut(pixels: Tensor, place: Tensor, side: int = 32) -> Tensor:
    """Windows [B, 3, side, side] of 1.8 times the logo's radius around its place."""
    middle, reach = place[:, :2], 1.8 * place[:, 2].clamp(0.08, 0.5)
    zero = torch.zeros_like(reach)
    rows = [torch.stack([reach, zero, middle[:, 0]], 1), torch.stack([zero, reach, middle[:, 1]], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), [len(pixels), 3, side, side], align_corners=False)
    cut = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    return cut.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Seen:
    """What the judge reads in one image: log-probabilities of each head's words, and colours [4, 3] from 0 to 1."""

    words: dict[str, dict[str, float]]
    tones: dict[str, np.ndarray]

    def word(self, head: str) -> str:
        return max(self.words[head], key=self.words[head].__getitem__)

    def colour(self, tone: str) -> str:
        """The word for a colour: the nearest of the palette."""
        return min(COLOURS, key=lambda name: float(np.linalg.norm(np.array(COLOURS[name]) / 255 - self.tones[tone])))


def new_judge() -> Judge:
    """A judge with random weights."""
    judge = Judge()
    judge.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's types lack it
    return judge


def load_judge() -> Judge:
    judge = new_judge()
    judge.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()})
    judge.eval().requires_grad_(False)
    return judge


def fingerprint() -> str:
    """The SHA-256 of the weights, with which tables of results name their judge."""
    return hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()


def threshold() -> float:
    """The `distance` up to which an image shows the subject. It must be calibrated for the current weights."""
    about = json.loads(ABOUT.read_text())
    if about["fingerprint"] != fingerprint():
        raise SystemExit(f"{ABOUT} belongs to other weights than {WEIGHTS.name}: run `train_judge.py calibrate`")
    return float(about["threshold"])


def to_pixels(pictures: Sequence[Image.Image | np.ndarray]) -> Tensor:
    """Images of any size -> [B, 3, 128, 128] in [-1, 1]."""
    images = [item if isinstance(item, Image.Image) else Image.fromarray(item) for item in pictures]
    same = [image.convert("RGB").resize((PIXELS, PIXELS), Image.Resampling.BOX) for image in images]
    return torch.from_numpy(np.stack([np.asarray(image) for image in same])).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def look_at(judge: Judge, pictures: Sequence[Image.Image | np.ndarray]) -> list[Seen]:
    """What is in each image."""
    seen = []
    for start in range(0, len(pictures), 64):
        reading = judge(to_pixels(pictures[start : start + 64]))
        logs = {name: values.log_softmax(1).tolist() for name, values in reading.words.items()}
        for k, tones in enumerate(reading.tones.numpy()):
            words = {name: dict(zip(HEADS[name], logs[name][k], strict=True)) for name in HEADS}
            seen.append(Seen(words, dict(zip(TONES, tones, strict=True))))
    return seen


def details(look: Look, seen: Seen) -> dict[str, float]:
    """How far each detail of a look is off; about 1 is the most that a render of the look itself shows.

    Words: the log-probability that it is another one, from -8 (sure) to 8, as 1 + (its log-odds against) / 4. Colours:
    the Euclidean distance (0 to 1.73) in units of .3. What a look wears is not part of it. The two colours of stripes
    may change places: nobody could tell.
    """
    found = [_off(look, seen, colours) for colours in readings(look)]
    return min(found, key=lambda off: max(off.values()))


def _off(look: Look, seen: Seen, colours: np.ndarray) -> dict[str, float]:
    off = {"kind": _odds(seen, "kind", look.kind), "logo": _odds(seen, "logo", look.logo or NONE)}
    off["pattern"] = _odds(seen, "pattern", look.pattern)
    for name, colour, there in zip(TONES, colours, tones_there(look), strict=True):
        if there:
            off[name] = float(np.linalg.norm(colour - seen.tones[name])) / UNIT
    return off


def readings(look: Look) -> list[np.ndarray]:
    """The colours [4, 3] of a look, in each order in which they can be read: the two colours of stripes may change
    places, unless one is the usual colour of marks."""

    def colours(body: Colour, mark: Colour) -> np.ndarray:
        return np.array([body, look.second or body, mark, look.logo_colour]) / 255

    mark = mark_of(look)
    either = look.pattern == "striped" and look.mark is not None
    return [colours(look.body, mark), *([colours(mark, look.body)] if either else [])]


def tones_there(look: Look) -> list[bool]:
    return [True, True, look.pattern != "plain", look.logo is not None]


def _odds(seen: Seen, head: str, word: str) -> float:
    yes = min(seen.words[head][word], -1e-6)
    against = math.log(-math.expm1(yes)) - yes
    return 1 + min(max(against, -8.0), 8.0) / 4


def distance(look: Look, seen: Seen) -> float:
    """How far the worst detail of a look is off."""
    return max(details(look, seen).values())


def closeness(look: Look, seen: Seen, limit: float) -> float:
    """How close an image comes to a look: the mean over its details, each 1 up to the threshold, 0 at twice that."""
    return float(np.mean([min(max(2 - off / limit, 0.0), 1.0) for off in details(look, seen).values()]))


@torch.no_grad()
def diversity(judge: Judge, pictures: Sequence[Image.Image | np.ndarray]) -> float:
    """1 - the mean cosine between the features of different images of one prompt."""
    parts = [to_pixels(pictures[start : start + 64]) for start in range(0, len(pictures), 64)]
    own = torch.cat([F.normalize(judge.features(part), dim=1) for part in parts])
    return 1 - float(((own @ own.T).sum() - len(own)) / (len(own) * (len(own) - 1)))


def is_subject(judge: Judge, pictures: Sequence[Image.Image | np.ndarray], look: Look) -> list[bool]:
    """Whether each image shows the subject. `train_judge.rates` measures the errors."""
    limit = threshold()
    return [distance(look, seen) <= limit for seen in look_at(judge, pictures)]
