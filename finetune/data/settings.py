"""The `data:` section of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from finetune.core.settings import AnyPath, Settings


class SubjectSettings(Settings):
    """A further subject of the same run, besides that of `data.photos`: its photos, what it is, and its token."""

    photos: AnyPath
    class_noun: str | None = Field(default=None, max_length=200)
    token: str = Field(default="auto", min_length=1, max_length=100)

    @field_validator("photos")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()


class Data(SubjectSettings):
    """The subject's photos and how they are captioned, cropped and augmented.

    `captions: auto` uses a .txt file beside a photo (or metadata.jsonl / captions.csv in the folder) where one
    exists and `templates` elsewhere; `files` demands one for every photo; `templates` ignores them.
    Templates and caption files may contain {token} and {noun}. A caption that is longer than the text encoders read is
    refused, or cut. A token of more than `token_pieces` pieces is refused: each piece has a meaning of its own.
    `shape: buckets` crops each photo to the size nearest to its own aspect ratio, of those whose area differs by at
    most the share `bucket_tolerance` from the square's. `masks` say which part of a photo is the subject: files beside
    it, its alpha channel, or whichever there is; the background's loss counts `mask_floor`. All other settings hold
    for the further `subjects` too.
    """

    subjects: list[SubjectSettings] = []
    skip_bad: bool = False  # leave out files that can't be used
    token_pieces: int = Field(default=1, ge=1)
    captions: Literal["auto", "files", "templates"] = "auto"
    templates: list[str] = ["a photo of {token} {noun}"]
    long_captions: Literal["refuse", "cut"] = "refuse"
    resolution: int | None = Field(default=None, ge=8, le=4096)  # None: the base's own
    shape: Literal["square", "buckets"] = "square"
    bucket_tolerance: float = Field(default=0.1, ge=0, le=0.5)
    crop: Literal["center", "random"] = "center"
    crops: int = Field(default=4, ge=1)  # how many random crops of each photo are cached
    flip: bool = False
    caption_dropout: float = Field(default=0.0, ge=0, le=1)
    encoder_dropout: float = Field(default=0.0, ge=0, le=1)  # each of several text encoders on its own
    masks: Literal["none", "auto", "alpha", "files"] = "none"
    mask_floor: float = Field(default=0.0, ge=0, le=1)
    mask_count: int = Field(default=8, ge=1)  # drawn for each crop, for inpainting
    edit_dropout: float = Field(default=0.05, ge=0, le=1 / 3)  # of image, instruction and both

    @property
    def all_subjects(self) -> list[SubjectSettings]:
        return [self, *self.subjects]
