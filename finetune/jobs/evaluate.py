"""`finetune evaluate`: measures what runs, adapter files and folders of images show, side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar, cast

from finetune import __version__
from finetune.core.devices import best_device
from finetune.core.errors import BadInput
from finetune.core.events import phase
from finetune.core.files import sha256, write_json
from finetune.core.logging import quieted
from finetune.data.photos import Photo, scan
from finetune.evaluation.backbones.base import Backbone
from finetune.evaluation.base import KINDS, Kind, Metric, Pictures, Score, Seen
from finetune.evaluation.comparable import uneven
from finetune.evaluation.prompts_file import Called, prompts_for, table_of, templates
from finetune.evaluation.registry import BACKBONES, chosen_metrics
from finetune.evaluation.statistics import Vectors
from finetune.jobs.evaluated import ToldWords, Trained, Wish, drawn, find_source, photos_trained_on
from finetune.report.evaluation import write_page
from finetune.runs.folder import RunFolder, is_run
from finetune.sampling.settings import Sampling

SCHEMA = 1
PACKAGES = ("torch", "transformers", "diffusers", "pillow", "numpy")  # whose versions can change a number
RESULT, PAGE = "evaluation.json", "evaluation.html"
Named = TypeVar("Named", Trained, Pictures)


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate, and how.

    Attributes:
        sources: runs and adapter files, which draw; folders: images that exist already, each with a table.
        photos: the folder of photos (or a style's drawings) to compare with.
        out: the folder for images, JSON and page.
        metrics: names with commas; None: the usual ones.
        prompts: a file with prompts; None: the package's own for this kind.
        kind: "object", "live" or "style"; None: told by the class noun, or by the run.
        words: what files and folders are called; of a run, which of its subjects.
        backbones: kind -> a folder, a file or a hub id.
        count, class_count: images for each prompt, and for the class alone.
        seed: the first; image n of a prompt has `seed` + n.
        sampling: how images are drawn, but for the guidance. None of its sizes: as trained.
        guidance: None: each run's own, or 5.
        base, step, weight: as for `finetune sample`.
    """

    sources: Sequence[Path]
    photos: Path
    out: Path
    folders: Sequence[Path] = ()
    metrics: str | None = None
    prompts: Path | None = None
    kind: str | None = None
    words: ToldWords = field(default_factory=ToldWords)
    backbones: Mapping[str, str] = field(default_factory=dict)
    count: int = 4
    class_count: int = 16
    seed: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    guidance: float | None = None
    base: str | None = None
    step: int | None = None
    weight: float = 1.0


@quieted()
def evaluate(asked: Evaluation, tell: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Draws what is missing, measures all of it, and writes `out`/evaluation.json and `out`/evaluation.html.

    Everything that can be refused is refused before the first image is drawn, and before anything is written.

    Args:
        tell: gets a line for each thing that a person should know.

    Returns:
        What is in the JSON file.

    Raises:
        BadInput: a source, the photos, a metric or a network can't be used.
    """
    _check_places(asked)
    photos = scan(asked.photos)
    words = replace(asked.words, style=asked.kind == "style")
    sources = _named([find_source(path, words, asked.base, asked.step, asked.weight) for path in asked.sources])
    kind = _kind(asked, sources)
    digests = [photo.digest for photo in photos]
    trained_on = [photos_trained_on(source, digests) for source in sources]
    wishes = [_wish(asked, source, kind) for source in sources]
    given = [_pictures(folder, _called(asked, sources)) for folder in asked.folders]
    metrics = _metrics(asked, kind)
    eyes = _Eyes.opened(metrics, asked.backbones, photos)
    measured = [eyes.score(pictures, metrics) for pictures in given]
    fresh = [drawn(source, wish, asked.out / "images") for source, wish in zip(sources, wishes, strict=True)]
    fresh = [
        _seen_before(item, count, len(photos), source.is_run)
        for item, count, source in zip(fresh, trained_on, sources, strict=True)
    ]
    measured = [eyes.score(pictures, metrics) for pictures in fresh] + measured
    pictures = _named([*fresh, *given])
    values = _result(asked, (kind, photos), eyes, metrics, pictures, measured)
    for note in (*_undrawn(asked), *_unread(asked, metrics), *values["notes"]):
        tell(note)
    write_json(asked.out / RESULT, values)
    write_page(asked.out / PAGE, values, pictures, [photo.path for photo in photos])
    return values


def _check_places(asked: Evaluation) -> None:
    if not asked.sources and not asked.folders:
        raise BadInput("nothing to evaluate: give a run, a LoRA file, or a folder of images with --images DIR")
    if asked.photos.is_file():
        raise BadInput(f"--on {asked.photos} is a file: give the folder that holds the photos")
    if is_run(asked.photos):
        raise BadInput(
            f"--on {asked.photos} is a run's folder: the run goes before --on, and the photos' folder after it"
        )
    there = next((place for place in (asked.out, *asked.out.absolute().parents) if place.exists()), asked.out)
    if not there.is_dir():
        raise BadInput(f"--out {asked.out} can't be a folder, because {there} is a file: give another folder")
    if asked.kind is not None and asked.kind not in KINDS:
        raise BadInput(f"there is no --kind {asked.kind!r}: give object, live or style")
    inside = [path for path in (*asked.sources, *asked.folders) if path.absolute() == asked.photos.absolute()]
    if inside:
        raise BadInput(f"{inside[0]} is also the folder of photos: give what was trained, and --on the photos")
    _check_words(asked)


def _check_words(asked: Evaluation) -> None:
    """Refuses what would have no effect: a run has its own base and its own words."""
    runs = [path for path in asked.sources if is_run(path)]
    files = len(runs) < len(asked.sources)
    if asked.base is not None and not files:
        raise BadInput(
            f"--base {asked.base} is for LoRA files and there is none, and a run has its own base: leave it out"
        )
    told = {"--class-noun": asked.words.noun, "--token": asked.words.token}
    named = next((name for name, value in told.items() if value is not None), None)
    choosing = named == "--token" and any(RunFolder(path).info.subjects for path in runs)
    if named is not None and not files and not asked.folders and not choosing:
        raise BadInput(f"{named} is for LoRA files and folders of images, and a run knows its own words: leave it out")


def _named(items: Sequence[Named]) -> list[Named]:
    """The same with different names."""
    found: list[Named] = []
    for item in items:
        found.append(replace(item, name=_free(item.name, [other.name for other in found])))
    return found


def _free(name: str, taken: Sequence[str]) -> str:
    number, candidate = 2, name
    while candidate in taken:
        candidate, number = f"{name} ({number})", number + 1
    return candidate


def _seen_before(pictures: Pictures, count: int | None, photos: int, is_run: bool) -> Pictures:
    """With a note where the source was trained on the photos that it is compared with, or may have been."""
    if count == 0:
        return pictures
    note = f"{count} of the {photos} photos were trained on, so that a copy of one counts as likeness"
    if count is None:
        who = "its record" if is_run else "a file"
        note = f"{who} does not say whether the photos were trained on; if so, a copy of one counts as likeness"
    return replace(pictures, notes=[note, *pictures.notes])


def _kind(asked: Evaluation, sources: Sequence[Trained]) -> Kind:
    """The kind of all sources, which must be one: otherwise they would get different prompts."""
    if asked.kind is not None:
        wrong = next((item for item in sources if bool(item.called.style) != (asked.kind == "style")), None)
        if wrong is not None:
            learned = "a style" if wrong.called.style else "a subject"
            raise BadInput(f"--kind {asked.kind} does not fit {wrong.path}, which learned {learned}: leave it out")
        return cast(Kind, asked.kind)
    found = {prompts_for(source.called): source for source in sources}
    if not sources:
        noun = asked.words.noun or ""
        return prompts_for(Called("", noun)) if noun else "object"
    if len(found) > 1:
        told = " and ".join(f"{source.path} is {kind}" for kind, source in found.items())
        raise BadInput(f"{told}, and they would get different prompts: choose with --kind, or evaluate them apart")
    return next(iter(found))


def _called(asked: Evaluation, sources: Sequence[Trained]) -> Called | None:
    """The words in the prompts of folders: of the command line, else of the first source."""
    if asked.words.token is not None:
        style = asked.kind == "style"
        return Called(style=asked.words.token) if style else Called(asked.words.token, asked.words.noun or "")
    return sources[0].called if sources else None


def _wish(asked: Evaluation, source: Trained, kind: Kind) -> Wish:
    subject = [source.called.prompt(text) for text in templates(asked.prompts, kind)]
    classes = source.called.of_class
    seeds = [range(asked.seed, asked.seed + asked.count)] * len(subject)
    seeds += [range(asked.seed, asked.seed + asked.class_count)] * len(classes)
    return Wish([*subject, *classes], seeds, asked.sampling, asked.guidance)


def _pictures(folder: Path, called: Called | None) -> Pictures:
    prompts, files = table_of(folder, called)
    name = folder.name or folder.absolute().name
    digests = [[sha256(file) for file in own] for own in files]
    return Pictures(name, prompts, files, {"name": name, "kind": "images", "sha256": digests})


def _metrics(asked: Evaluation, kind: Kind) -> list[Metric]:
    metrics = chosen_metrics(asked.metrics, kind, set(asked.backbones))
    if asked.metrics is not None:
        unfit = next((item for item in metrics if item.group == "class" and kind == "style"), None)
        if unfit is not None:
            raise BadInput(f"the metric {unfit.name} is about a class and a style has none: leave it out of --metrics")
        few = next((item for item in metrics if item.least > asked.count), None)
        if few is not None and asked.sources:
            raise BadInput(f"the metric {few.name} compares images of one prompt: give --count {few.least} or more")
    return metrics


def _undrawn(asked: Evaluation) -> list[str]:
    """Settings of images to draw, where none are drawn."""
    drawing = {"--prompts": asked.prompts, "--step": asked.step, "--guidance": asked.guidance}
    drawing["--size"] = asked.sampling.size
    given = [] if asked.sources else [name for name, value in drawing.items() if value is not None]
    return [f"{name} changes nothing, as the images of --images exist already" for name in given]


def _unread(asked: Evaluation, metrics: Sequence[Metric]) -> list[str]:
    """Networks that were given and are not needed."""
    read = {item.backbone for item in metrics}
    unread = [name for name in asked.backbones if name not in read]
    return [f"{BACKBONES[name].option().split()[0]} is read by none of the chosen metrics" for name in unread]


class _Eyes:
    """The networks, and what they see of the photos."""

    def __init__(self, backbones: dict[str, Backbone], photos: dict[str, Vectors]) -> None:
        self.backbones, self.photos = backbones, photos

    @classmethod
    def opened(cls, metrics: Sequence[Metric], given: Mapping[str, str], photos: Sequence[Photo]) -> _Eyes:
        first = {metric.backbone: metric.name for metric in reversed(metrics)}
        order = sorted(first, key=lambda kind: (kind not in given, kind))  # a slip is told before anything is fetched
        found = {kind: BACKBONES[kind].opened(given.get(kind), first[kind]) for kind in order}
        device, files = best_device(), [photo.path for photo in photos]
        seen = {}
        with phase("Networks", len(found), "networks") as advance:
            for kind, backbone in found.items():
                backbone.to(device)
                seen[kind] = backbone.see(files)
                advance(1, kind)
        return cls(found, seen)

    def score(self, pictures: Pictures, metrics: Sequence[Metric]) -> dict[str, Score]:
        """Metric -> its value for these images."""
        found: dict[str, Score] = {}
        kinds = sorted({metric.backbone for metric in metrics})
        with phase(f"Measuring {pictures.name}"[:40], len(kinds), "networks") as advance:
            for kind in kinds:
                seen = self._seen(kind, pictures)
                found |= {metric.name: metric.score(seen) for metric in metrics if metric.backbone == kind}
                advance(1, kind)
        return found

    def _seen(self, kind: str, pictures: Pictures) -> Seen:
        backbone = self.backbones[kind]
        rows = backbone.see([file for files in pictures.files for file in files])
        images, start = [], 0
        for files in pictures.files:
            images.append(rows[start : start + len(files)])
            start += len(files)
        texts = backbone.read([prompt.plain for prompt in pictures.prompts]) if backbone.reads_text else None
        return Seen(pictures.prompts, images, self.photos[kind], texts)

    def notes(self, pictures: Sequence[Pictures]) -> list[str]:
        """What the networks that read text don't read."""
        plain = list(dict.fromkeys(prompt.plain for item in pictures for prompt in item.prompts))
        cut = {kind: eye.cut(plain) for kind, eye in self.backbones.items()}
        return [
            f"{kind} reads only the beginning of {len(texts)} prompts, such as {texts[0]!r}"
            for kind, texts in cut.items()
            if texts
        ]


def _result(
    asked: Evaluation,
    on: tuple[Kind, Sequence[Photo]],
    eyes: _Eyes,
    metrics: Sequence[Metric],
    pictures: Sequence[Pictures],
    measured: Sequence[Mapping[str, Score]],
) -> dict[str, Any]:
    kind, photos = on
    return {
        "schema": SCHEMA,
        "finetune": __version__,
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "kind": kind,
        "photos": {"count": len(photos), "sha256": [photo.digest for photo in photos]},
        "seeds": {"first": asked.seed, "count": asked.count, "class_count": asked.class_count},
        "backbones": {name: {"name": eye.name, "sha256": eye.hash} for name, eye in eyes.backbones.items()},
        "sources": [_source(item, asked.out) for item in pictures],
        "metrics": [_measured(metric, eyes, pictures, measured) for metric in metrics],
        "notes": [*_told(pictures), *eyes.notes(pictures), *uneven(pictures)],
    }


def _told(pictures: Sequence[Pictures]) -> list[str]:
    """The notes of all sources, each once."""
    by_note: dict[str, list[str]] = {}
    for item in pictures:
        for note in item.notes:
            by_note.setdefault(note, []).append(item.name)
    return [f"{', '.join(names)}: {note}" for note, names in by_note.items()]


def _source(pictures: Pictures, out: Path) -> dict[str, Any]:
    prompts = [
        {**asdict(prompt), "images": [_below(file, out) for file in files]}
        for prompt, files in zip(pictures.prompts, pictures.files, strict=True)
    ]
    return {**pictures.about, "name": pictures.name, "prompts": prompts}


def _below(file: Path, out: Path) -> str:
    """Below the page's folder, else the name alone: results are shared, and name no folders of this machine."""
    return file.relative_to(out).as_posix() if file.is_relative_to(out) else file.name


def _measured(
    metric: Metric, eyes: _Eyes, pictures: Sequence[Pictures], measured: Sequence[Mapping[str, Score]]
) -> dict[str, Any]:
    values = []
    for item, scores in zip(pictures, measured, strict=True):
        score = scores[metric.name]
        by_prompt = {item.prompts[number].text: value for number, value in score.prompts.items()}
        values.append({"source": item.name, **asdict(score), "prompts": by_prompt})
    about = ("name", "title", "backbone", "higher_is_better", "group", "meaning", "blind", "source")
    return {
        **{name: getattr(metric, name) for name in about},
        "reference": metric.reference(eyes.photos[metric.backbone]),
        "values": values,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
