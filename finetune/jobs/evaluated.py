"""What is evaluated: runs and adapter files that draw, and folders of images that exist already."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from finetune.adapters.inspection import open_adapter
from finetune.core.devices import empty_cache, machine
from finetune.core.errors import BadInput
from finetune.core.events import phase
from finetune.core.files import public_name, sha256
from finetune.data.decoding import BadImage, open_image
from finetune.evaluation.base import Pictures, Prompt
from finetune.evaluation.prompts_file import Called
from finetune.families.base import Family
from finetune.families.digests import base_hash
from finetune.jobs.images import name_cut_prompts
from finetune.jobs.open import base_to_draw, open_result
from finetune.runs.folder import RunFolder, is_run
from finetune.runs.inputs import DIGITS, read_inputs, trained_images
from finetune.runs.record import RecordedSubject, RunRecord
from finetune.sampling.draw import check_sampling, draw
from finetune.sampling.images import parameters, save_image
from finetune.sampling.settings import Sampling

NAMED = 2  # prompts that are too long and shown


@dataclass(frozen=True)
class ToldWords:
    """What the command line says of the subject; None where it says nothing."""

    token: str | None = None
    noun: str | None = None
    style: bool = False  # whether `token` holds the words that call a style


@dataclass(frozen=True)
class Trained:
    """A run or an adapter file.

    `digest` is the SHA-256 of what was trained; `base` the base to open a file with, `step` a run's checkpoint.
    """

    path: Path
    name: str
    called: Called
    digest: str
    base: str | None = None
    step: int | None = None
    weight: float = 1.0

    @property
    def is_run(self) -> bool:
        """Whether it is a run's folder, and not an adapter."""
        return is_run(self.path)


def find_source(path: Path, words: ToldWords, base: str | None, step: int | None, weight: float) -> Trained:
    """Looks at a run or a file without reading its base's weights.

    Raises:
        BadInput: it is neither, or what its subject is called is not known.
    """
    name = path.name or path.absolute().name
    if is_run(path):
        folder = RunFolder(path)
        folder.refuse_links()
        called = _called_by(folder.info, words, path)
        return Trained(path, name, called, _digest_of(folder, step), step=step, weight=weight)
    if path.is_dir() and not any(path.glob("*/adapter_config.json")):  # no PEFT folder either
        raise BadInput(
            f"{path} is neither a run's folder nor an adapter: give a run, a LoRA file, or --images {path} for a "
            "folder of images"
        )
    if step is not None:
        raise BadInput(f"--step {step} chooses a run's checkpoint and {path} is no run folder: leave it out")
    chosen = base_to_draw(path, base)
    _, found = open_adapter(path, chosen)  # refuses one of another base: now rather than after the first drawings
    called = _called_in(path, found.metadata, words)
    digest = base_hash(path) if path.is_dir() else sha256(path)
    return Trained(path, name, called, digest, chosen, weight=weight)


def _called_by(info: RunRecord, words: ToldWords, path: Path) -> Called:
    """By a run's record; the token chooses one of several subjects."""
    _refuse_inputs(path, info.reads)
    subjects: list[RunRecord | RecordedSubject] = [*info.subjects] or [info]
    known = [
        (item.token, item.class_noun or "", item.style, trained == item.token)
        for item, trained in zip(subjects, info.names, strict=True)
    ]
    if len(known) > 1:
        known = [item for item in known if item[0] == words.token]
        if not known:
            tokens = ", ".join(item.token for item in info.subjects)
            raise BadInput(f"{path} learned several subjects: choose one with --token ({tokens})")
    token, noun, style, alone = known[0]
    if not token:
        raise BadInput(f"{path} does not say its token (run.json is missing or older): restore the run's own run.json")
    return Called(token, noun, style.lstrip(" ,;:"), alone and bool(noun))


def _called_in(path: Path, metadata: dict[str, str], words: ToldWords) -> Called:
    """By the command line, else by the trigger phrase in a file's header, such as "zwx mug"."""
    phrase = " ".join(metadata.get("modelspec.trigger_phrase", "").split())
    if words.style:
        style = words.token or phrase
        if not style:
            raise BadInput(f"the header of {path} has no words for its style: give them with --token 'in zwx style'")
        return Called(style=style)
    token, noun = words.token, words.noun
    if token is None and noun is not None and phrase.lower().endswith(f" {noun.lower()}"):
        token = phrase[: -len(noun)].strip()
    elif token is None and len(phrase.split()) == (2 if noun is None else 1):
        token = phrase.split()[0]
    if noun is None and token and phrase.startswith(f"{token} "):
        noun = phrase[len(token) :].strip()
    if not token or not noun:
        missing = " and ".join(["--token"] * (not token) + ["--class-noun"] * (not noun))
        said = f"says only {phrase!r}" if phrase else "has no trigger phrase"
        raise BadInput(f"the header of {path} {said}: say what its subject is called with {missing}")
    return Called(token, noun, alone=phrase == token)


def _digest_of(folder: RunFolder, step: int | None) -> str:
    """Of the recipe, which says how the weights are used, and of the weights."""
    chosen = folder.step_to_open(step)
    trained = folder.path / "adapter" if chosen is None else folder.path / "checkpoints" / f"step-{chosen:06d}"
    if not trained.is_dir():
        raise BadInput(f"{folder.path} has not trained anything yet: run `finetune resume {folder.path}` first")
    whole = f"{sha256(folder.path / 'recipe.yaml')}\n{base_hash(trained)}\n"
    return hashlib.sha256(whole.encode()).hexdigest()


@dataclass(frozen=True)
class Wish:
    """Images to draw: each prompt at its seeds."""

    prompts: Sequence[Prompt]
    seeds: Sequence[Sequence[int]]
    sampling: Sampling
    guidance: float | None  # None: the run's own, or 5


def drawn(source: Trained, wish: Wish, folder: Path) -> Pictures:
    """Draws what is not there yet into a folder below `folder`, whose name is a hash of all that decides the images:
    the trained weights, the base, the strength and the sampling. Images that are there are not drawn again.

    Raises:
        BadInput: it can't be opened, or not be drawn with these settings.
    """
    device, dtype = machine()
    family, info = open_result(
        source.path, source.base or "tiny", device, dtype, weight=source.weight, step=source.step
    )
    size = wish.sampling.size or info.resolution or family.resolution
    guidance = info.guidance if wish.guidance is None else wish.guidance
    sampling = replace(wish.sampling, size=size, guidance=guidance)
    check_sampling(family, sampling, "--")
    _refuse_inputs(source.path, family.drawing.wants.needed)
    about = _about(source, family, info, sampling, str(dtype).removeprefix("torch."))
    decided = json.dumps({**about, "name": ""}, sort_keys=True).encode()
    place = folder / f"{_plain_name(source.name)}-{hashlib.sha256(decided).hexdigest()[:12]}"
    files = [[place / _file_name(prompt, seed) for seed in seeds] for prompt, seeds in _pairs(wish)]
    notes = _of_run(source) + _some(
        name_cut_prompts(family, [*(prompt.text for prompt in wish.prompts), sampling.negative])
    )
    _draw_missing(family, wish, sampling, files, (source.name, info.base or source.base or ""))
    del family
    gc.collect()
    empty_cache()
    return Pictures(source.name, wish.prompts, files, about, notes)


def _of_run(source: Trained) -> list[str]:
    """That a run has not finished."""
    if not source.is_run or source.step is not None:
        return []
    step = RunFolder(source.path).step_to_open(None)
    return [] if step is None else [f"the run has not finished: measured is its checkpoint of step {step}"]


def photos_trained_on(source: Trained, digests: Sequence[str]) -> int | None:
    """How many of the photos with these SHA-256 a source was trained on.

    None: it does not tell, as a file, a run without a record, or one whose record does not list its data set's images.

    Raises:
        BadInput: the run's record of its photos is damaged.
    """
    record = read_inputs(source.path) if source.is_run else None
    if record is None:
        return None
    info, inputs = RunFolder(source.path).info, record.inputs
    held_out = info.planned.verdicts.held_out if info.planned and info.planned.verdicts else []
    rows = {table.token for table in inputs.tables}
    tokens = [each.token for each in info.subjects for _ in range(each.photos) if each.token not in rows]
    names = [photo.name for photo in inputs.photos]
    if len(tokens) == len(names):  # of several subjects, as the plan tells their photos apart
        names = [f"{name} of {token}" for name, token in zip(names, tokens, strict=True)]
    own = trained_images(inputs, names, held_out)
    return None if own is None else sum(digest[:DIGITS] in own for digest in digests)


def _some(lines: list[str]) -> list[str]:
    """A few of many lines."""
    more = len(lines) - NAMED
    return lines if more < 1 else [*lines[:NAMED], f"{more} further prompts are too long for its text encoder"]


def _refuse_inputs(path: Path, needed: Sequence[str]) -> None:
    """Refuses a base that needs more than a prompt to draw from, such as an image and a mask."""
    if needed:
        raise BadInput(
            f"the base of {path} draws from more than a prompt ({', '.join(needed)}): draw with `finetune sample` "
            "and give the folder with --images"
        )


def _about(source: Trained, family: Family, info: RunRecord, sampling: Sampling, dtype: str) -> dict[str, Any]:
    settings = {name: value for name, value in asdict(sampling).items() if name != "batch_size"}
    return {
        "name": source.name,
        "kind": "run" if source.is_run else "adapter",
        "digest": source.digest,
        "step": source.step,
        "weight": source.weight,
        "base": public_name(info.base or source.base or ""),
        "base_hash": info.base_hash or base_hash(family.folder),
        "token": source.called.token,
        "class_noun": source.called.noun,
        "style": source.called.style,
        "words": source.called.words,
        "dtype": dtype,
        "sampling": settings,
    }


def _pairs(wish: Wish) -> list[tuple[Prompt, Sequence[int]]]:
    return list(zip(wish.prompts, wish.seeds, strict=True))


def _file_name(prompt: Prompt, seed: int) -> str:
    return f"{hashlib.sha256(prompt.text.encode()).hexdigest()[:12]}-{seed}.png"


def _plain_name(name: str) -> str:
    kept = "".join(sign if sign.isalnum() or sign in "-_." else "-" for sign in name.removesuffix(".safetensors"))
    return kept.strip(".-")[:60] or "source"


def _is_whole(file: Path) -> bool:
    """Whether an image is there that can be read; what a full disk cut off is drawn again."""
    try:
        open_image(file)
    except (BadImage, OSError):
        return False
    return True


def _draw_missing(
    family: Family, wish: Wish, sampling: Sampling, files: list[list[Path]], named: tuple[str, str]
) -> None:
    """Batch by batch, each written when it is drawn, so that nothing of an interrupted evaluation is lost."""
    wanted = [
        (prompt.text, seed, file)
        for (prompt, seeds), own in zip(_pairs(wish), files, strict=True)
        for seed, file in zip(seeds, own, strict=True)
    ]
    missing = [item for item in wanted if not _is_whole(item[2])]
    name, model = named
    shown = phase(f"Drawing {name}"[:40], len(wanted), "images") if missing else nullcontext(lambda amount, note: None)
    with shown as advance:
        advance(len(wanted) - len(missing), "")
        for start in range(0, len(missing), sampling.batch_size):
            batch = missing[start : start + sampling.batch_size]
            images = draw(family, [text for text, _, _ in batch], sampling, seeds=[seed for _, seed, _ in batch])
            for (text, seed, file), image in zip(batch, images, strict=True):
                save_image(image, file, parameters(text, seed, sampling, model))
            advance(len(batch), "")
