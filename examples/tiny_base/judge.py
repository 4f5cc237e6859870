"""The judge: a small classifier trained on renders only, that says what a 64x64 picture shows.

    python examples/tiny_base/judge.py --out build       # trains it and writes judge.safetensors here

Class, colour, pattern and place are read by heads of their own. Likeness is the cosine of an embedding that was
trained to tell one wild look (body, second tone, pattern, logo) from another across poses and places.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
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
PICTURES, PAIRS = 12000, 6000


class Judge(nn.Module):
    """64x64 RGB in [-1, 1] -> logits per head, and a unit embedding of the look [B, 64]."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 72, 96)
        layers: list[nn.Module] = []
        for before, after in zip(widths, widths[1:], strict=False):
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


def to_pixels(pictures: Sequence[Image.Image | np.ndarray]) -> Tensor:
    """Pictures of any size -> [B, 3, 64, 64] in [-1, 1]."""
    images = [item if isinstance(item, Image.Image) else Image.fromarray(item) for item in pictures]
    small = [np.asarray(image.convert("RGB").resize((64, 64), Image.Resampling.BOX)) for image in images]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float() / 127.5 - 1


def classify(judge: Judge, pictures: Sequence[Image.Image]) -> dict[str, list[str]]:
    logits, _ = judge(to_pixels(pictures))
    return {name: [HEADS[name][k] for k in values.argmax(1)] for name, values in logits.items()}


def features(judge: Judge, pictures: Sequence[Image.Image]) -> Tensor:
    """Unit embeddings [B, 64]."""
    return judge(to_pixels(pictures))[1]


def likeness(judge: Judge, pictures: Sequence[Image.Image], references: Sequence[Image.Image]) -> Tensor:
    """Each picture's mean cosine to the references [B]."""
    return (features(judge, pictures) @ features(judge, references).T).mean(1)


def diversity(judge: Judge, pictures: Sequence[Image.Image]) -> float:
    """1 - the mean cosine between different pictures of one prompt."""
    own = features(judge, pictures)
    count = len(own)
    return 1 - float(((own @ own.T).sum() - count) / (count * (count - 1)))


def _world(index: int) -> tuple[np.ndarray, list[int]]:
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
    """Mild blur, noise and brightness: generated pictures are softer than renders."""
    if torch.rand(()) < 0.5:
        soft = F.interpolate(F.avg_pool2d(pixels, 2), scale_factor=2, mode="bilinear", align_corners=False)
        pixels = torch.lerp(pixels, soft, float(torch.rand(())) * 0.9)
    return pixels + torch.randn_like(pixels) * 0.08 * float(torch.rand(())) + 0.05 * torch.randn(len(pixels), 1, 1, 1)


def _loss(judge: Judge, world: Tensor, labels: Tensor, pairs: Tensor) -> Tensor:
    """Cross entropy of the heads, and of picking a look's other photo out of the batch (InfoNCE, arXiv:1807.03748)."""
    logits, _ = judge(augment(world))
    loss = sum((F.cross_entropy(logits[name], labels[:, k]) for k, name in enumerate(HEADS)), torch.zeros(()))
    first, second = judge(augment(pairs[:, 0]))[1], judge(augment(pairs[:, 1]))[1]
    scores = first @ second.T / 0.1
    own = torch.arange(len(scores))
    return loss + F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)


def train(steps: int, batch: int = 64) -> Judge:
    torch.manual_seed(0)
    with ProcessPoolExecutor() as pool:
        world = list(pool.map(_world, range(PICTURES), chunksize=200))
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
            print(step, round(float(loss), 3), flush=True)
    return judge.eval()


@torch.no_grad()
def examine(judge: Judge) -> dict[str, float]:
    """Accuracy on 1,200 renders that were never shown, and how well the subjects are told from their classes."""
    held = [_world(PICTURES + k) for k in range(1200)]
    logits, _ = judge(to_pixels([picture for picture, _ in held]))
    figures = {
        name: float((logits[name].argmax(1) == torch.tensor([row[k] for _, row in held])).float().mean())
        for k, name in enumerate(HEADS)
    }
    for name in SUBJECTS:
        references = [subject_picture(name, k) for k in range(20)]
        own = likeness(judge, [subject_picture(name, 1000 + k) for k in range(60)], references)
        others = likeness(judge, [class_picture(name, k) for k in range(200)], references)
        figures[f"{name}: subject"], figures[f"{name}: class"] = float(own.mean()), float(others.mean())
        threshold = float(own.mean() + others.mean()) / 2
        figures[f"{name}: subject missed"] = float((own < threshold).float().mean())
        figures[f"{name}: class taken for it"] = float((others > threshold).float().mean())
    return figures


def class_picture(kind: str, index: int) -> Image.Image:
    """A render of any other thing of a class."""
    rng = np.random.default_rng((6, CLASSES.index(kind), index))
    facts = Facts(kind, *[str(rng.choice(HEADS[name])) for name in ("colour", "pattern", "place")])
    return render(pose(look_of(facts, rng), facts.place, rng))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build"))
    parser.add_argument("--steps", type=int, default=1500)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    trained = train(arguments.steps)
    figures = examine(trained)
    print(json.dumps(figures, indent=2))
    (arguments.out / "judge.json").write_text(json.dumps(figures, indent=2) + "\n")
    save_file({name: value.half().contiguous() for name, value in trained.state_dict().items()}, WEIGHTS)
