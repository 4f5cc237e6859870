"""Writes the files beside the exports: the model card, its images, and sidecar files for UIs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.core.files import copy_plain, public_name, write_json, write_text
from finetune.core.records import checks_of
from finetune.export.card import Card, licence_of, model_card, sidecar
from finetune.export.lora.diffusers import Diffusers
from finetune.export.lora.kohya import Kohya
from finetune.export.registry import artifact_of, embedding_exports
from finetune.export.settings import UNCHECKED
from finetune.families.registry import FAMILIES
from finetune.families.source import resolve_base
from finetune.runs.exports import read_exports
from finetune.runs.folder import RunFolder


def write_companions(folder: RunFolder) -> None:
    """Writes the model card README.md and its images to RUN/exports, and NAME.json and NAME.png for UIs.

    UIs show the last two beside NAME.safetensors, so they are written only if that file exists.

    Raises:
        BadInput: the run folder holds a link that leads out of it, or a damaged record; or its base is missing.
    """
    folder.refuse_links()
    target, card = folder.path / "exports", _card(folder)
    for number, (_, url) in enumerate(card.images):
        copy_plain(_pictures(folder, number)[0], target / url, folder.path)
    write_text(target / "README.md", model_card(card))
    if (target / f"{card.title}.safetensors").is_file():
        write_json(target / f"{card.title}.json", sidecar(card))
        if card.images:
            copy_plain(target / card.images[0][1], target / f"{card.title}.png", folder.path)


def _card(folder: RunFolder) -> Card:
    recipe, info = folder.recipe, folder.info
    listed = read_exports(folder.path)
    base = resolve_base(recipe.base.source, recipe.base.revision, recipe.base.like)
    prompts = [prompt for number, prompt in enumerate(info.prompts) if _pictures(folder, number)]
    photos = recipe.run.batch_size
    settings = {
        "method": recipe.method.kind,
        "steps": f"{recipe.run.steps}, each on {photos} photo{'s' if photos > 1 else ''}",
        "learning rate": f"{recipe.optim.lr:g}",
        "resolution": str(info.resolution),
        "prior preservation": recipe.prior.kind,
        "seed": str(recipe.run.seed),
        "base hash": info.base_hash[:16],
    }
    whole = any(artifact_of(item["format"]) == "weights" for item in listed)
    words = next((item for item in listed if artifact_of(item["format"]) == "embedding"), None)
    word = Path(words["path"]).name if words else ""
    loading = embedding_exports([words["format"]])[0].usage(info.family, word, info.token) if words else []
    return Card(
        title=recipe.run.name if whole or recipe.method.is_adapter else f"{recipe.run.name}-lora",
        trigger=info.trigger,
        activation=info.trigger.replace(info.token, Path(word).stem) if words else info.trigger,
        loading=loading,
        family=info.family,
        base=public_name(recipe.base.source),
        licence=licence_of(base),
        holds=recipe.method.artifacts if whole or recipe.method.is_adapter else ("adapter",),
        settings=settings,
        images=[(prompt, f"images/{number:02d}.png") for number, prompt in enumerate(prompts)],
        files=[_line(item) for item in listed],
        lora=_for_diffusers(listed, info.family),
    )


def _line(item: dict[str, Any]) -> str:
    said = [check.line for check in checks_of(item)] or [UNCHECKED]
    readers = [f"read by {', '.join(item['read_by'])}"] if item["read_by"] else []
    told = "; ".join([*said, *readers, *item.get("limits", [])])
    return f"`{_beside(item)}` ({item['format']}): {' '.join(told.split())}"


def _beside(item: dict[str, Any]) -> str:
    """An exported file's path from the card."""
    return Path(item["path"]).relative_to("exports").as_posix()


def _for_diffusers(listed: Sequence[dict[str, Any]], family: str) -> str:
    """The LoRA file that diffusers reads, as a path from the card; "" if there is none."""
    files = {item["format"]: _beside(item) for item in listed}
    state, _ = FAMILIES[family].naming.known_readers.verdict(Kohya.name, "diffusers")
    formats = {"fully": (Kohya.name, Diffusers.name), "unknown": (Diffusers.name, Kohya.name)}
    return next((files[form] for form in formats.get(state, (Diffusers.name,)) if form in files), "")


def _pictures(folder: RunFolder, prompt: int) -> list[Path]:
    return sorted((folder.path / "samples" / "after").glob(f"{prompt:02d}-*.png"))
