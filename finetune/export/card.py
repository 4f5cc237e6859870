"""Writes the files that accompany an export: the sidecar for Forge and InvokeAI, and a model card for the hub."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetune.core.errors import BadInput
from finetune.core.files import leads_out
from finetune.core.reading import parse_yaml, read_bytes
from finetune.families.registry import FAMILIES
from finetune.families.toy import TINY

TAGS = {
    "adapter": ["lora", "template:sd-lora"],
    "native": [],
    "weights": [],
    "embedding": ["textual_inversion"],
}  # the hub's
# without it transformers keeps the precision of the files and diffusers does not: fp16 embeddings at an fp32 UNet
ONE_PRECISION = ".to(torch.float32)"  # any version of diffusers reads it


@dataclass(frozen=True)
class Card:
    """The content of a model card.

    `base`: a hub id or a name. `pictures`: (prompt, image file beside the card). `files`: lines about the exports.
    """

    title: str
    trigger: str
    family: str
    base: str
    licence: str | None
    holds: Sequence[str]  # of "adapter", "weights" and "embedding"
    settings: dict[str, str]
    images: Sequence[tuple[str, str]]
    files: Sequence[str]
    activation: str = ""  # the word for prompts in UIs, if it differs from the trigger
    lora: str = ""  # the LoRA file for diffusers, beside the card; "" if none is there that it reads
    loading: Sequence[str] = ()  # lines of Python that load the embeddings


def sidecar(card: Card) -> dict[str, Any]:
    """The content of NAME.json, which Forge, A1111 and InvokeAI read."""
    return {
        "description": f"{card.trigger}: trained on {card.base}",
        "sd version": FAMILIES[card.family].naming.labels.sidecar,
        "activation text": card.activation or card.trigger,
        "preferred weight": 1.0,
        "notes": "; ".join(f"{name} {value}" for name, value in card.settings.items()),
    }


def model_card(card: Card) -> str:
    """The text of README.md: YAML front matter for the hub, then the page."""
    front: dict[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusers", *(tag for what in card.holds for tag in TAGS[what])],
        "instance_prompt": card.trigger,
    }
    if card.base.count("/") == 1:
        front["base_model"] = card.base
    if card.licence:
        front["license"] = card.licence
    front["widget"] = [{"text": prompt, "output": {"url": url}} for prompt, url in card.images]
    licence = (
        f"That of the base: {card.licence}." if card.licence else "That of the base, which its folder does not state."
    )
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {card.title}",
        "<Gallery />" if card.images else "",
        f"Write `{' '.join(card.trigger.replace('`', '').split())}` in a prompt. Trained on {card.base}.",
        "## Files\n\n" + "\n".join(f"- {line}" for line in card.files),
        _use(card),
        "## Settings\n\n| | |\n|---|---|\n"
        + "\n".join(f"| {name} | {value} |" for name, value in card.settings.items()),
        f"## Licence\n\n{licence}",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _use(card: Card) -> str:
    prompt = card.images[0][0] if card.images else card.trigger
    lora = f'pipeline.load_lora_weights(".", weight_name="{card.lora}")'
    lines = [
        "import torch",
        "from diffusers import DiffusionPipeline",
        *_pipeline(card),
        *([lora] if card.lora else []),
        *card.loading,
        f"pipeline({_quoted(prompt)}).images[0]",
    ]
    code = "\n".join(lines)
    return f"## Use\n\n```python\n{code}\n```"


def _pipeline(card: Card) -> list[str]:
    """The lines that open the base, or the whole model that was exported."""
    if "weights" in card.holds:
        source, note = _quoted(f"{card.title}-model"), ""
    elif card.base == TINY:
        package = ["from finetune.families.source import resolve_base  # pip install finetune-diffusion"]
        return [
            *package,
            "",
            f"pipeline = DiffusionPipeline.from_pretrained(resolve_base({_quoted(TINY)})){ONE_PRECISION}",
        ]
    else:
        note = "" if card.base.count("/") == 1 else "  # the path of this folder on your machine"
        source = _quoted(card.base)
    return ["", f"pipeline = DiffusionPipeline.from_pretrained({source}){ONE_PRECISION}{note}"]


def _quoted(text: str) -> str:
    """The text as a Python string literal: users paste the code, so the text must not run as code."""
    return json.dumps(text, ensure_ascii=False)


def licence_of(folder: Path) -> str | None:
    """The licence in the base's own model card; None if there is none."""
    file = folder / "README.md"
    if not file.is_file():
        return None
    if leads_out(file, folder):  # a link out of the base: its content must not get into a card that is shared
        return None
    text = read_bytes(file).decode("utf-8", "replace")
    if not text.startswith("---"):
        return None
    try:
        front = parse_yaml(text[3:].split("\n---", 1)[0], str(file))
    except BadInput:
        return None
    stated = front.get("license") if isinstance(front, dict) else None
    return " ".join(str(stated).split())[:100] if stated else None
