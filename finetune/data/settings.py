"""The `data:` section of a recipe."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from finetune.core.settings import AnyPath, Settings

Repeats = Annotated[int, Field(ge=1, le=10_000)]
Weight = Annotated[float, Field(ge=0, le=1_000)]
Share = Annotated[float, Field(gt=0, le=1_000)]
MIX_NAME = re.compile(r"[A-Za-z0-9_-]{1,50}")
HUB = re.compile(r"hf:/*(?:datasets/)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


def hub_id(path: Path) -> tuple[str, str | None] | None:
    """The hub id and the revision that `data.photos` names as hf:OWNER/NAME@REVISION; None for a path."""
    found = HUB.fullmatch(path.as_posix())
    return (found[1], found[2]) if found else None


class SubjectSettings(Settings):
    """A further subject in the same run: its photos, its class noun and its token.

    `repeats`: how often each photo is seen in an epoch; `weights`: the loss weight of photos. Both may name photos by
    patterns of their file names ("close-*.jpg"); the first pattern that fits counts, and other photos have 1.
    """

    photos: AnyPath
    class_noun: str | None = Field(default=None, max_length=200)
    token: str = Field(default="auto", min_length=1, max_length=100)
    repeats: Repeats | dict[str, Repeats] = 1
    weights: dict[str, Weight] = {}

    @field_validator("class_noun", "token")
    @classmethod
    def _a_word(cls, value: str | None) -> str | None:
        if value and not value.strip():
            raise ValueError("it is blank: give a word, such as dog for the class noun, or leave it out")
        return value

    @field_validator("photos")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        on_hub = hub_id(value)
        if on_hub is not None:
            return Path(f"hf:{on_hub[0]}" + (f"@{on_hub[1]}" if on_hub[1] else ""))
        return value.expanduser().absolute()


class Data(SubjectSettings):
    """The subject's photos and how they are captioned, cropped and augmented.

    `captions: auto` uses a .txt file beside a photo (or metadata.jsonl / captions.csv in the folder) if there is one,
    and `templates` otherwise. `captions: files` requires a file for every photo, `captions: templates` ignores files.
    Templates and caption files may contain {token} and {noun}. A caption that is too long for the text encoders is
    refused or cut, as `long_captions` says. A token of more than `token_pieces` pieces is refused, because each piece
    has a meaning of its own. `trigger` is for styles: words with {token} that call the style, such as "in {token}
    style". They are added to every caption that has no token. `shape: buckets` crops each photo to a size near its own
    aspect ratio; the areas of these sizes differ from the square's by at most the share `bucket_tolerance`. `masks`
    mark the subject in a photo, as files beside it, as its alpha channel, or (`auto`) as either; the background has
    the loss weight `mask_floor`. `hold_out` photos of each subject are not trained on: the verdicts are measured on
    them (`run.verdicts`). `photos` may name a Hugging Face data set (`source`): it is read through `datasets`, from
    `image_column` and `caption_column` of `split`, streamed if `streaming`. `cache_dtype` is how cached latents and
    prompts are stored, `workers` how many threads decode images. Settings that the further `subjects` do not have hold
    for them too.

    `shuffle_tags` draws the order of a caption's comma-separated tags behind the first `keep_tags`: `tag_orders`
    orders of each caption are encoded, and each step draws one. `caption_mix` gives a photo several captions, each
    drawn by its share (arXiv:2403.03206 section 5.3): `own`, `templates`, or NAME for files PHOTO.NAME.txt or a column
    of metadata.jsonl. A photo that lacks one of them draws among its others.
    """

    subjects: list[SubjectSettings] = []
    source: str = "auto"  # or one of finetune.data.sources
    split: str | None = Field(default=None, min_length=1, max_length=200)
    image_column: str | None = Field(default=None, min_length=1, max_length=200)
    caption_column: str | None = Field(default=None, min_length=1, max_length=200)
    streaming: bool = False
    workers: int | None = Field(default=None, ge=1, le=64)  # None: one for each core, at most 8
    cache_dtype: Literal["fp32", "fp16"] = "fp32"
    skip_bad: bool = False  # leave out files that can't be used
    hold_out: int = Field(default=0, ge=0, le=100)
    token_pieces: int = Field(default=1, ge=1)
    captions: Literal["auto", "files", "templates"] = "auto"
    templates: list[str] = ["a photo of {token} {noun}"]
    caption_mix: dict[str, Share] = {}
    shuffle_tags: bool = False
    keep_tags: int = Field(default=0, ge=0, le=1_000)
    tag_orders: int = Field(default=16, ge=2, le=1_000)
    trigger: str = Field(default="", max_length=200)
    long_captions: Literal["refuse", "cut"] = "refuse"
    resolution: int | None = Field(default=None, ge=8, le=4096)  # pixels; None: the base's own
    shape: Literal["square", "buckets"] = "square"
    bucket_tolerance: float = Field(default=0.1, ge=0, le=0.5)
    crop: Literal["center", "random"] = "center"
    crops: int = Field(default=4, ge=1, le=10_000)  # how many random crops of each photo are cached
    flip: bool = False
    caption_dropout: float = Field(default=0.0, ge=0, le=1)
    encoder_dropout: float = Field(
        default=0.0, ge=0, le=1
    )  # probability for each of several text encoders independently
    masks: Literal["none", "auto", "alpha", "files"] = "none"
    mask_floor: float = Field(default=0.0, ge=0, le=1)
    mask_count: int = Field(default=8, ge=1, le=10_000)  # masks drawn for each crop, for inpainting
    edit_dropout: float = Field(
        default=0.05, ge=0, le=1 / 3
    )  # probability of dropping only the image, only the instruction, and both

    @field_validator("caption_mix")
    @classmethod
    def _names(cls, value: dict[str, float]) -> dict[str, float]:
        wrong = next((name for name in value if not MIX_NAME.fullmatch(name)), None)
        if wrong is not None:
            raise ValueError(
                f"{wrong!r} is no name of captions: give own, templates, or the NAME of files PHOTO.NAME.txt "
                "(letters, digits, _ and -)"
            )
        return value

    @field_validator("trigger")
    @classmethod
    def _calls(cls, value: str) -> str:
        if value.strip() and "{token}" not in value:
            raise ValueError(
                f"{value!r} has no {{token}}: write the words that call the style, such as 'in {{token}} style'"
            )
        return value.strip()

    @property
    def thing(self) -> str:
        """What the photos teach: "style" where words call it that name no class, or "subject"."""
        return "style" if self.trigger and self.class_noun is None else "subject"

    @property
    def all_subjects(self) -> list[SubjectSettings]:
        """The main subject, followed by the further ones."""
        return [self, *self.subjects]
