"""A recipe: a YAML file -> one strict `Recipe`. A setting lives in the module that reads it."""

from __future__ import annotations

import difflib
import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from finetune import families
from finetune.errors import BadInput
from finetune.families.base import Family
from finetune.methods import MethodSettings
from finetune.objectives import ObjectiveSettings
from finetune.optim import Optim
from finetune.penalties import Distance, FrozenBase, Preserve
from finetune.settings import AnyPath, Settings

# what Windows keeps for devices: no file can have such a name there, whatever its ending
DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))}
Sampler = Literal["dpm++", "ddim", "euler", "unipc"]  # finetune.families.samplers makes them


class Base(Settings):
    """`source`: "tiny", a diffusers folder, a hub id (`revision` pins one) or a single-file checkpoint (.safetensors).

    A file has weights only: configs and tokenizers come from `like`, a folder or hub id of the same kind. `without`
    leaves parts out that the family can do without (text_encoder_3, the T5 of SD3). `inputs` lets a plain base read a
    mask and what it leaves, a depth map, or the picture before an edit.
    """

    source: str = "tiny"
    revision: str | None = None
    like: str | None = None
    without: list[str] = []
    inputs: Literal["inpaint", "depth", "edit"] | None = None

    def load(self, dtype: torch.dtype = torch.float32) -> Family:
        """The family, frozen.

        Raises:
            BadInput: as `families.load`.
        """
        family = families.load(self.source, self.revision, dtype, self.like, self.without)
        if self.inputs is not None:
            family.widen(self.inputs)
        return family

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value


class Subject(Settings):
    """A further subject of the same run, beside `data.photos`: its photos, what it is, and its token."""

    photos: AnyPath
    class_noun: str | None = None
    token: str = Field("auto", min_length=1)

    @field_validator("photos")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()


class Data(Subject):
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

    subjects: list[Subject] = []
    skip_bad: bool = False  # leave out files that can't be used
    token_pieces: int = Field(1, ge=1)
    captions: Literal["auto", "files", "templates"] = "auto"
    templates: list[str] = ["a photo of {token} {noun}"]
    long_captions: Literal["refuse", "cut"] = "refuse"
    resolution: int | None = Field(None, ge=8, le=4096)  # None: the base's own
    shape: Literal["square", "buckets"] = "square"
    bucket_tolerance: float = Field(0.1, ge=0, le=0.5)
    crop: Literal["center", "random"] = "center"
    crops: int = Field(4, ge=1)  # how many random crops of each photo are cached
    flip: bool = False
    caption_dropout: float = Field(0.0, ge=0, le=1)
    encoder_dropout: float = Field(0.0, ge=0, le=1)  # each of several text encoders on its own
    masks: Literal["none", "auto", "alpha", "files"] = "none"
    mask_floor: float = Field(0.0, ge=0, le=1)
    mask_count: int = Field(8, ge=1)  # drawn for each view, for inpainting
    edit_dropout: float = Field(0.05, ge=0, le=1 / 3)  # of picture, instruction and both

    @property
    def all_subjects(self) -> list[Subject]:
        return [self, *self.subjects]


class NoPrior(Preserve):
    """No prior preservation."""

    kind: Literal["none"] = "none"


class ClassImages(Preserve):
    """Prior preservation with class images (arXiv:2208.12242 eq. 2), drawn once by the frozen base.

    `folder`: None keeps the set in the cache, named by what it was made of. A folder of the user's own pictures
    (without a manifest) is used as it is. `caption_dropout` empties class captions, so that the empty prompt does
    not learn the subject and guidance keeps the class as it was.
    """

    kind: Literal["class_images"] = "class_images"
    weight: float = Field(1.0, ge=0)
    count: int = Field(100, ge=1)
    prompt: str = "a photo of a {noun}"
    negative: str = ""
    folder: AnyPath | None = None
    sampler: Sampler = "dpm++"
    steps: int = Field(20, ge=1)
    guidance: float = 4.0
    batch_size: int = Field(8, ge=1)
    caption_dropout: float = Field(0.25, ge=0, le=1)
    flip: bool = True

    @property
    def prompts(self) -> list[str]:
        return [self.prompt]


Prior = Annotated[NoPrior | ClassImages | FrozenBase | Distance, Field(discriminator="kind")]


class Run(Settings):
    """The run itself.

    `batch_size` is what one optimiser step sees: so many subject photos, and as many class images beside them.
    It is split over `accumulate` micro-batches and over the processes, so that the result does not depend on
    how many there are.
    """

    dir: AnyPath | None = None  # None: runs/<name>-<n>
    name: str = Field("run", pattern=r"^\w[\w .+-]*$", max_length=100)  # of files: no folders in it
    seed: int = 0
    steps: int = Field(800, ge=1)
    batch_size: int = Field(1, ge=1)
    accumulate: int = Field(1, ge=1)
    processes: int | None = Field(None, ge=1)  # None: as many as were launched
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    deterministic: bool = False  # the same bits on CUDA too; slower there
    gradient_checkpointing: bool = False
    ema: float | None = Field(None, gt=0, lt=1)
    checkpoint_every: int = Field(250, ge=1)
    keep: int = Field(2, ge=1)
    log_every: int = Field(1, ge=1)
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = []

    @field_validator("name")
    @classmethod
    def _fits_every_system(cls, value: str) -> str:
        if value.split(".")[0].strip().lower() in DEVICES or value.endswith((".", " ")):
            raise ValueError(
                "no file can have that name on Windows (a device, or a dot or space at its end): change it"
            )
        return value


class Sample(Settings):
    """Pictures: previews during the run (`every` steps, 0 for none) and the before/after grid of the page."""

    prompts: list[str] = [
        "a photo of {token} {noun}",
        "a photo of {token} {noun} on the beach",
        "a photo of {token} {noun} in the snow",
        "a photo of a {noun}",
    ]
    negative: str = ""
    every: int = Field(0, ge=0)
    count: int = Field(4, ge=1)
    seed: int = 0
    sampler: Sampler = "dpm++"
    steps: int = Field(25, ge=1)
    guidance: float = 5.0
    image_guidance: float = Field(1.5, ge=1)  # how closely an edit keeps to its picture


class ExportTo(Settings):
    """`formats`: empty for all that can hold what was trained. `metadata`: "minimal" is what readers need;
    "standard" adds trigger, date, base hash, steps and seed; "full" also the recipe (with its paths) and the captions.

    What is no LoRA leaves as one by singular values: `rank` is its rank (None: the smallest that meets `max_error`, at
    most 128), `max_error` the largest |LoRA - change| / |change| over all modules that is no failure.
    """

    formats: list[str] = []
    rank: int | None = Field(None, ge=1)
    max_error: float = Field(0.2, gt=0, le=1)
    metadata: Literal["minimal", "standard", "full"] = "standard"
    dtype: Literal["fp32", "fp16", "bf16"] = "fp16"


class Recipe(Settings):
    """Everything a run depends on. `RUN/recipe.yaml` holds it resolved."""

    base: Base = Base()
    data: Data
    prior: Prior = NoPrior()
    method: MethodSettings
    objective: ObjectiveSettings = ObjectiveSettings()
    optim: Optim
    run: Run = Run()
    sample: Sample = Sample()
    export: ExportTo = ExportTo()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.run.batch_size % self.run.accumulate:
            raise ValueError(
                f"run.batch_size {self.run.batch_size} can't be split into run.accumulate {self.run.accumulate} "
                "equal micro-batches: make it a multiple"
            )
        if self.optim.text_lr is not None and not self.method.has_text_lr:
            raise ValueError(
                "optim.text_lr is set but method.parts has no text_encoders: add them, or leave text_lr out"
            )
        if self.export.rank is not None and (self.method.adapter.low_rank or self.method.leaves == ("embedding",)):
            raise ValueError(
                f"export.rank is {self.export.rank} but a {self.method.kind} leaves as it was trained: leave it out, "
                "or make the file smaller with `finetune resize`"
            )
        if any("{token}" in prompt for prompt in self.prior.prompts):
            raise ValueError("prior.prompt has {token}, but it names the class without the subject: use {noun} alone")
        if isinstance(self.prior, Distance) and not self.method.measures_distance:
            raise ValueError(
                f"prior.kind is distance, which method.kind {self.method.kind} does not measure: use "
                "prior.kind=frozen_base, or method.kind=lora"
            )
        texts = [*self.data.templates, *self.prior.prompts]
        if self.data.class_noun is None and any("{noun}" in text for text in texts):
            raise ValueError(
                "data.class_noun is missing but a template uses {noun}: say what the subject is, such as "
                "data.class_noun=dog"
            )
        if self.data.subjects:
            _check_subjects(self, any("{noun}" in text for text in texts))
        return self


def _check_subjects(recipe: Recipe, noun_needed: bool) -> None:
    """What several subjects in one run may not be. Raises ValueError in a sentence, as pydantic wants it."""
    subjects = recipe.data.all_subjects
    if "embedding" in recipe.method.leaves:
        raise ValueError(
            f"data.subjects has further subjects but method.kind {recipe.method.kind} makes a word for one: use "
            "method.kind=lora, or train each subject in a run of its own"
        )
    for subject in subjects:
        if noun_needed and subject.class_noun is None:
            raise ValueError(
                f"the subject in {subject.photos} has no class_noun but a template uses {{noun}}: say there what it "
                "is, such as class_noun: dog"
            )
    tokens = [subject.token.lower() for subject in subjects if subject.token != "auto"]  # CLIP reads no capitals
    twice = next((token for token in tokens if tokens.count(token) > 1), None)
    if twice is not None:
        raise ValueError(f"the token {twice!r} is given to two subjects: give each its own, or leave it out (auto)")
    folders = [subject.photos for subject in subjects]
    again = next((folder for folder in folders if folders.count(folder) > 1), None)
    if again is not None:
        raise ValueError(f"{again} holds the photos of two subjects: give each a folder of its own")
    if isinstance(recipe.prior, ClassImages) and recipe.prior.folder and len({s.class_noun for s in subjects}) > 1:
        raise ValueError(
            f"prior.folder is {str(recipe.prior.folder)!r} but there are several class nouns: leave it out, so that "
            "each has its own class images"
        )


def load_recipe(source: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """A shipped recipe's name or a YAML file, with `section.key=value` overrides, as a checked `Recipe`.

    Raises:
        BadInput: no such recipe, not YAML, an unknown key (the nearest known one is named) or a bad value.
    """
    from finetune.recipes import find

    return read_recipe(find(str(source)), overrides)


def read_recipe(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """A recipe file as a checked `Recipe`.

    Raises:
        BadInput: as `load_recipe`.
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = " ".join(str(error).split())
        raise BadInput(f"{path} is not valid YAML ({where}): mend that line") from error
    return parse_recipe(raw if raw is not None else {}, overrides, where=str(path))


class _Loader(yaml.SafeLoader):
    """Plain data only, and a key that stands twice is an error: YAML would take the last one in silence."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def parse_recipe(raw: Any, overrides: list[str] | tuple[str, ...] = (), where: str = "the recipe") -> Recipe:
    """A recipe from plain data (nested dictionaries), as YAML or JSON gives it."""
    if not isinstance(raw, dict):
        raise BadInput(f"{where} holds a {type(raw).__name__} where sections such as 'data:' should be: mend it")
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in raw.items()}
    for override in overrides:
        _override(values, override)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise BadInput(_sentence(error, where)) from error


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every key, in the order of the sections."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors."""
    return TypeAdapter(Recipe).json_schema()


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    section, _, name = key.partition(".")
    if not equals or not section:
        raise BadInput(f"{override!r} is no setting: write section.key=value, such as run.steps=400")
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError as error:
        raise BadInput(f"the value of {override!r} is not valid YAML: put it in quotes") from error
    if not name:
        values[section] = value
        return
    inside = values.setdefault(section, {})
    if not isinstance(inside, dict):
        inside = values[section] = {"source": inside} if section == "base" else {"kind": inside}
    if name == "kind" and inside.get("kind") != value:
        inside.clear()  # another kind has other keys: those of the recipe's kind do not carry over
    inside[name] = value


def _sentence(error: ValidationError, where: str) -> str:
    """pydantic's first complaint (an unknown key before a missing one, which it may be) as one sentence that names the
    key, the value and what to do."""
    complaints = error.errors(include_url=False)
    first = next((item for item in complaints if item["type"] == "extra_forbidden"), complaints[0])
    location = [str(part) for part in first["loc"]]
    known, shown = _keys_at(location[:-1])
    key = ".".join([*shown, *location[-1:]])
    if first["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*shown, nearest[0]])!r}?" if nearest else f"known are {', '.join(known)}"
        return f"{where}: there is no setting {key!r}; {hint}"
    if first["type"] == "missing":
        how = "give it in the recipe" + ("" if any(part.isdigit() for part in location) else f" or as {key}=VALUE")
        return f"{where}: {key!r} is missing: {how}"
    message = first["msg"].removeprefix("Value error, ")
    value = "" if isinstance(first["input"], dict) else f" is {reprlib.repr(first['input'])[:80]}"
    subject = f"{key}{value}: " if key else ""  # none where sections contradict each other
    return f"{where}: {subject}{message[0].lower()}{message[1:]}"


def _keys_at(location: list[str]) -> tuple[list[str], list[str]]:
    """The known keys of the section at a pydantic location, and that location without the union tags."""
    model: Any = Recipe
    shown: list[str] = []
    kinds: dict[str, type[Settings]] = {}
    for part in location:
        if part in kinds:
            model, kinds = kinds[part], {}
            continue
        options = _options(model, part)
        model = options[0] if options else model
        kinds = {option.model_fields["kind"].default: option for option in options} if len(options) > 1 else {}
        shown.append(part)
    return list(model.model_fields), shown


def _options(model: Any, name: str) -> list[type[Settings]]:
    """The section classes that `model.name` may hold."""
    field = model.model_fields.get(name)
    if field is None:
        return []
    candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
    return [c for c in candidates if isinstance(c, type) and issubclass(c, Settings)]
