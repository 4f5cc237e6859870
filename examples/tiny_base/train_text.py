"""Trains the tiny base's text encoder alone to recognise a caption's attributes. Later it is frozen.

    python examples/tiny_base/train_text.py --out build

An encoder of this size that is only trained together with the denoiser learns the background and little else. After a
minute of this training first, the denoiser learns all attributes. The heads read every position from the end of the
caption on, because the denoiser reads all of them.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from captions import ATTRIBUTES, PLACE_PHRASES, UNSTATED, caption
from looks import COLOURS, NAMES, PATTERNS, Facts, named_facts, training_facts
from shapes import CLASSES, LOGOS, WORN
from tokenizer import LENGTH
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WIDTH = 128
WORDS: dict[str, tuple[str, ...]] = {
    "kind": CLASSES,
    "colour": tuple(COLOURS),
    "pattern": PATTERNS,
    "place": tuple(PLACE_PHRASES),
    "second": tuple(COLOURS),
    "logo": tuple(LOGOS),
    "logo_colour": tuple(COLOURS),
    "worn": tuple(WORN),
    "name": NAMES,
}
LABELS = {name: (*WORDS[name], UNSTATED) for name in ATTRIBUTES}


def make_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return CLIPTextModel(config)


def examples(count: int, rng: np.random.Generator) -> tuple[list[str], dict[str, Tensor]]:
    texts: list[str] = []
    labels: dict[str, list[int]] = {name: [] for name in LABELS}
    for _ in range(count):
        facts: Facts = named_facts(rng) if rng.random() < 0.3 else training_facts(rng)
        text, stated = caption(facts, rng)
        texts.append(text)
        for name, known in LABELS.items():
            labels[name].append(known.index(stated[name]))
    return texts, {name: torch.tensor(values) for name, values in labels.items()}


def scores(encoder: CLIPTextModel, heads: nn.ModuleDict, ids: Tensor, end: int) -> dict[str, Tensor]:
    """Logits [B, positions, labels] at every position after the caption's end."""
    hidden = encoder(ids).last_hidden_state
    first_end = (ids == end).int().argmax(1)
    after = torch.arange(ids.shape[1])[None] >= first_end[:, None]
    assert bool(after.any(1).all())
    return {name: head(hidden[after]) for name, head in heads.items()} | {"_after": after}


def train(out: Path, steps: int = 1500, batch: int = 64) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    encoder = make_encoder(tokenizer)
    heads = nn.ModuleDict({name: nn.Linear(WIDTH, len(words)) for name, words in LABELS.items()})
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01, fused=True)
    rng = np.random.default_rng(5)
    encoder.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss, right = _loss(encoder, heads, tokenizer, batch, rng)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(step, round(float(loss), 4), right, flush=True)
    with torch.no_grad():
        _, right = _loss(encoder, heads, tokenizer, 1000, np.random.default_rng(6))
    encoder.save_pretrained(out / "text_encoder")
    (out / "text.json").write_text(json.dumps({"steps": steps, "right": right}, indent=2) + "\n")
    print("held-out captions:", right)


def _loss(
    encoder: CLIPTextModel, heads: nn.ModuleDict, tokenizer: CLIPTokenizer, batch: int, rng: np.random.Generator
) -> tuple[Tensor, dict[str, float]]:
    texts, labels = examples(batch, rng)
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    out = scores(encoder, heads, ids, tokenizer.eos_token_id)
    after = out.pop("_after")
    total, right = torch.zeros(()), {}
    for name, logits in out.items():
        wanted = labels[name][:, None].expand_as(after)[after]
        total = total + F.cross_entropy(logits, wanted)
        right[name] = round(float((logits.argmax(1) == wanted).float().mean()), 4)
    return total, right


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build"))
    parser.add_argument("--steps", type=int, default=1500)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train(arguments.out, arguments.steps)
