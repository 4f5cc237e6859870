"""What exports and reports say about a run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime

from finetune import __version__
from finetune.config.load import dump_recipe
from finetune.export.metadata import written_date
from finetune.runs.folder import RunFolder


def about_run(folder: RunFolder, metadata: str | None = None) -> dict[str, str]:
    """Returns the metadata that exports of this run carry, as `metadata` asks (None: the recipe's `export.metadata`):
    name -> text.

    Paths and captions are in it only if that is "full"; of more than 1,000 photos, those captions that the record
    lists. The resolution is in pixels.

    Raises:
        BadInput: the run's recipe or record is missing or damaged.
    """
    recipe, info = folder.recipe, folder.info
    side, wanted = info.resolution, metadata or recipe.export.metadata
    needed = {"title": recipe.run.name, "resolution": f"{side}x{side}", "trigger_phrase": "", "date": ""}
    if wanted == "minimal":
        return needed
    standard = {
        "title": recipe.run.name,
        "resolution": f"{side}x{side}",
        "trigger_phrase": info.trigger,
        "base_hash": info.base_hash,
        "steps": str(recipe.run.steps),
        "seed": str(recipe.run.seed),
        "version": __version__,
        "train_images": str(info.count),
        **({"started": str(info.started)} if info.started is not None else {}),
        **_date(folder),
    }
    if wanted == "standard":
        return standard
    captions = list(dict.fromkeys(text for texts in info.captions for text in texts))
    return standard | {
        "recipe": dump_recipe(recipe),
        "captions": json.dumps(captions, ensure_ascii=False),
        "tag_frequency": json.dumps({info.trigger: info.tags or caption_tags(info.captions)}, ensure_ascii=False),
    }


def caption_tags(captions: Iterable[list[str]]) -> dict[str, int]:
    """Each part of a caption between commas -> the number of photos that have it, as kohya counts tags."""
    counted: Counter[str] = Counter()
    for texts in captions:
        tags = dict.fromkeys(tag.strip().lower() for text in texts for tag in text.split(",") if tag.strip())
        counted.update(list(tags))
    return dict(counted)


def _date(folder: RunFolder) -> dict[str, str]:
    """The time at which training ended, so that a repeated export gives the same file. Empty during training."""
    file = folder.path / "adapter" / "trained.safetensors"
    if not file.is_file():
        return {}
    return {"date": written_date(datetime.fromtimestamp(file.stat().st_mtime, UTC))}
