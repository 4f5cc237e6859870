"""The judge: a small classifier for 64x64 images, which is trained only on renders.

    python examples/tiny_base/judge.py       # trains it; writes judge.safetensors and judge.json beside this file

Class, colour, pattern and place each have their own head. Likeness is the cosine of embeddings that were trained to
distinguish wild looks (body, second tone, pattern, logo) across poses and places. An image "is" a subject if its
likeness to the subject's renders is above a threshold in judge.json.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from world import (
    CLASSES,
    COLOURS,
    PATTERNS,
    PLACES,
    SUBJECTS,
    Facts,
    look_of,
    pose,
    random_facts,
    render,
    subject_picture,
    wild_look,
)

HEADS = {"kind": CLASSES, "colour": tuple(COLOURS), "pattern": PATTERNS, "place": PLACES}
WEIGHTS = Path(__file__).with_name("judge.safetensors")
ABOUT = Path(__file__).with_name("judge.json")
PICTURES, PAIRS = 12000, 6000
Transform = Callable[[np.ndarray], np.ndarray]  # images uint8 [B, 64, 64, 3] -> the same


def as_is(pictures: np.ndarray) -> np.ndarray:
    return pictures


class Judge(nn.Module):
    """64x64 RGB in [-1, 1] -> logits per head, and a unit embedding of the look [B, 64]."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 72, 96)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(8, after), nn.SiLU()]
            layers += [nn.Conv2d(after, after, 3, 1, 1), nn.GroupNorm(8, after), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.shared = nn.Sequential(nn.Linear(96 * 16, 256), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(256, len(words)) for name, words in HEADS.items()})
        self.look = nn.Linear(256, 64)

    def forward(self, pixels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        hidden = self.shared(self.body(pixels).flatten(1))
        return {name: head(hidden) for name, head in self.heads.items()}, F.normalize(self.look(hidden), dim=1)


def load_judge() -> Judge:
    judge = Judge()
    judge.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()})
    return judge.eval().requires_grad_(False)


def fingerprint() -> str:
    """The SHA-256 of the weights, with which tables of results name their judge."""
    return hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()


def thresholds() -> dict[str, float]:
    """For each subject, the likeness above which an image shows it. It must be calibrated for the current weights."""
    about = json.loads(ABOUT.read_text())
    assert about["fingerprint"] == fingerprint(), "judge.json belongs to other weights: run `judge.py calibrate`"
    return about["thresholds"]


def to_pixels(pictures: Sequence[Image.Image | np.ndarray]) -> Tensor:
    """Images of any size -> [B, 3, 64, 64] in [-1, 1]."""
    images = [item if isinstance(item, Image.Image) else Image.fromarray(item) for item in pictures]
    small = [np.asarray(image.convert("RGB").resize((64, 64), Image.Resampling.BOX)) for image in images]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float() / 127.5 - 1


def classify(judge: Judge, pictures: Sequence[Image.Image | np.ndarray]) -> dict[str, list[str]]:
    logits, _ = judge(to_pixels(pictures))
    return {name: [HEADS[name][k] for k in values.argmax(1)] for name, values in logits.items()}


def features(judge: Judge, pictures: Sequence[Image.Image | np.ndarray]) -> Tensor:
    """Unit embeddings [B, 64]."""
    return judge(to_pixels(pictures))[1]


def likeness(
    judge: Judge, pictures: Sequence[Image.Image | np.ndarray], references: Sequence[Image.Image | np.ndarray]
) -> Tensor:
    """The mean cosine of each image to the references: [B]."""
    return (features(judge, pictures) @ features(judge, references).T).mean(1)


def subject_references(name: str) -> list[Image.Image]:
    return [subject_picture(name, k) for k in range(20)]


def is_subject(judge: Judge, pictures: Sequence[Image.Image | np.ndarray], name: str) -> list[bool]:
    """Whether each image shows the subject. `subject_rates` measures the error rates."""
    return (likeness(judge, pictures, subject_references(name)) > thresholds()[name]).tolist()


def diversity(judge: Judge, pictures: Sequence[Image.Image | np.ndarray]) -> float:
    """1 - the mean cosine between different images of one prompt."""
    own = features(judge, pictures)
    count = len(own)
    return 1 - float(((own @ own.T).sum() - count) / (count * (count - 1)))


def world_render(index: int) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng((4, index))
    facts = random_facts(rng)
    return np.asarray(render(pose(look_of(facts, rng), facts.place, rng))), _labels(facts)


def _labels(facts: Facts) -> list[int]:
    return [words.index(getattr(facts, name)) for name, words in HEADS.items()]


def _pair(index: int) -> np.ndarray:
    """Two photos of one wild look, in different poses and places."""
    rng = np.random.default_rng((5, index))
    look = wild_look(rng)
    return np.stack([np.asarray(render(pose(look, str(rng.choice(PLACES)), rng))) for _ in range(2)])


def augment(pixels: Tensor) -> Tensor:
    """Adds mild blur, noise and brightness changes, because generated images are softer than renders."""
    if torch.rand(()) < 0.5:
        soft = F.interpolate(F.avg_pool2d(pixels, 2), scale_factor=2, mode="bilinear", align_corners=False)
        pixels = torch.lerp(pixels, soft, float(torch.rand(())) * 0.9)
    return pixels + torch.randn_like(pixels) * 0.08 * float(torch.rand(())) + 0.05 * torch.randn(len(pixels), 1, 1, 1)


def _loss(judge: Judge, world: Tensor, labels: Tensor, pairs: Tensor) -> Tensor:
    """Cross entropy of the heads, and of finding a look's other photo in the batch (InfoNCE, arXiv:1807.03748)."""
    logits, _ = judge(augment(world))
    loss = sum((F.cross_entropy(logits[name], labels[:, k]) for k, name in enumerate(HEADS)), torch.zeros(()))
    first, second = judge(augment(pairs[:, 0]))[1], judge(augment(pairs[:, 1]))[1]
    scores = first @ second.T / 0.1
    own = torch.arange(len(scores))
    return loss + F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)


def train(steps: int, batch: int = 64) -> Judge:
    torch.manual_seed(0)
    with ProcessPoolExecutor() as pool:
        world = list(pool.map(world_render, range(PICTURES), chunksize=200))
        pairs = np.stack(list(pool.map(_pair, range(PAIRS), chunksize=200)))
    pictures, labels = np.stack([item[0] for item in world]), torch.tensor([item[1] for item in world])
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02, fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        chosen = torch.randint(PICTURES, (batch,))
        twins = torch.randint(PAIRS, (batch,))
        both = torch.stack([to_pixels(pairs[twins, k]) for k in (0, 1)], dim=1)
        loss = _loss(judge, to_pixels(pictures[chosen]), labels[chosen], both)
        loss.backward()
        nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(step, round(float(loss.detach()), 3), flush=True)
    return judge.eval()


@torch.no_grad()
def world_rates(judge: Judge, shown: Transform = as_is, count: int = 1200) -> dict[str, float]:
    """The accuracy of each head on held-out renders after the transform `shown`."""
    held = [world_render(PICTURES + k) for k in range(count)]
    logits, _ = judge(to_pixels(list(shown(np.stack([picture for picture, _ in held])))))
    labels = torch.tensor([row for _, row in held])
    return {name: float((logits[name].argmax(1) == labels[:, k]).float().mean()) for k, name in enumerate(HEADS)}


@torch.no_grad()
def calibrate(judge: Judge, count: int = 200) -> dict[str, float]:
    """For each subject, the likeness above which an image shows it.

    It is halfway between two values: the 1st percentile of the likeness of the subject's renders, and the 99th of
    renders of other things of its class, half of them with wild looks.
    """
    thresholds = {}
    for name in SUBJECTS:
        own, others = _likenesses(judge, name, 1000, count, as_is)
        thresholds[name] = round(float(own.quantile(0.01) + others.quantile(0.99)) / 2, 4)
    return thresholds


@torch.no_grad()
def subject_rates(judge: Judge, shown: Transform = as_is, count: int = 200) -> dict[str, float]:
    """Mean likeness and error rates (subjects missed, other things taken for the subject) on renders that `calibrate`
    did not use."""
    figures: dict[str, float] = {}
    for name, threshold in thresholds().items():
        own, others = _likenesses(judge, name, 5000, count, shown)
        figures[f"{name}: likeness of the subject"] = float(own.mean())
        figures[f"{name}: likeness of its class"] = float(others[:count].mean())  # renders with captioned looks
        figures[f"{name}: subject missed"] = float((own <= threshold).float().mean())
        figures[f"{name}: others taken for it"] = float((others > threshold).float().mean())
    return figures


def _likenesses(judge: Judge, name: str, start: int, count: int, shown: Transform) -> tuple[Tensor, Tensor]:
    span = range(start, start + count)
    own = np.stack([np.asarray(subject_picture(name, k)) for k in span])
    others = np.stack(
        [np.asarray(class_picture(name, k)) for k in span] + [np.asarray(odd_picture(name, k)) for k in span]
    )
    references = subject_references(name)
    return likeness(judge, list(shown(own)), references), likeness(judge, list(shown(others)), references)


def class_picture(kind: str, index: int) -> Image.Image:
    """A render of another thing of a class."""
    rng = np.random.default_rng((6, CLASSES.index(kind), index))
    facts = Facts(kind, *[str(rng.choice(HEADS[name])) for name in ("colour", "pattern", "place")])
    return render(pose(look_of(facts, rng), facts.place, rng))


def odd_picture(kind: str, index: int) -> Image.Image:
    """A render of a thing of a class with a wild look: like the subjects it is not in the palette, but it is none of
    them."""
    rng = np.random.default_rng((7, CLASSES.index(kind), index))
    return render(pose(wild_look(rng, kind), str(rng.choice(PLACES)), rng))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["train", "calibrate"], default="train")
    parser.add_argument("--steps", type=int, default=1200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.what == "train":
        trained = train(arguments.steps)
        save_file({name: value.half().contiguous() for name, value in trained.state_dict().items()}, WEIGHTS)
    loaded = load_judge()
    ABOUT.write_text(json.dumps({"fingerprint": fingerprint(), "thresholds": calibrate(loaded)}, indent=2) + "\n")
    print(json.dumps(world_rates(loaded) | subject_rates(loaded), indent=2))
