"""The subjects of a run (usually one): the photos, masks, token and captions of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config.recipe import Recipe
from finetune.core.errors import BadInput
from finetune.core.parallel import core_count
from finetune.data import tokens
from finetune.data.captions import Captioned, Words, caption_mixed, caption_photos, caption_rows_of, summarise
from finetune.data.masks import Mask, find_masks
from finetune.data.mixes import OWN, TEMPLATES, by_pattern, mix_captions, mix_rows, tag_count
from finetune.data.photos import Photo, scan_lenient
from finetune.data.settings import Data, SubjectSettings
from finetune.data.sources.base import SourceOptions
from finetune.data.sources.registry import open_source
from finetune.data.tables import Table, TableFacts
from finetune.data.trained_words import trained_words
from finetune.families.base import Family
from finetune.jobs.stored_tokens import suggested

MOST_WORKERS = 8
OF_DATA_SETS = ("split", "image_column", "caption_column", "streaming")
MOST_NAMED = 100  # photos in a message
TOGETHER = 1_000  # captions that a tokenizer reads at once


@dataclass(frozen=True)
class Scanned:
    """A subject's photos and masks in `folder`. `left_out` is a sentence about files that are not used, or empty.

    `table`: the data set that they come from, whose rows the photos are.
    """

    settings: SubjectSettings
    folder: Path
    photos: list[Photo]
    masks: dict[Path, Mask]
    left_out: str
    table: Table | None = None


@dataclass(frozen=True)
class Subject:
    """A subject with its token and captions. `summary` is a sentence about where the captions come from.

    `trigger`: the words that call a style, with the token in them; empty for other subjects. `table`: what the data
    set is that the photos are rows of, by content; None for files.
    """

    token: str
    noun: str | None
    captioned: list[Captioned]
    masks: dict[Path, Mask]
    summary: str
    trigger: str = ""
    table: TableFacts | None = None

    @property
    def photos(self) -> list[Photo]:
        """The photos, in the order of their captions."""
        return [item.photo for item in self.captioned]

    @property
    def words(self) -> str:
        """What calls it in its captions, such as "zwx mug" or "<zwx>"."""
        return trained_words(self.token, self.noun, (text for item in self.captioned for text in item.captions))

    def fill(self, prompt: str) -> str:
        """Returns a prompt with {token} and {noun} filled in."""
        return prompt.replace("{token}", self.token).replace("{noun}", self.noun or "")


def scan_subjects(data: Data) -> list[Scanned]:
    """Reads the photos and masks of every subject, in the order of the recipe.

    Raises:
        BadInput: the photos, masks or caption files of a subject can't be used; the message names the folder.
    """
    scanned = [_scan(data, subject) for subject in data.all_subjects]
    if not any(found.table for found in scanned):
        _refuse_options_of_data_sets(data)
    return scanned


def _refuse_options_of_data_sets(data: Data) -> None:
    given = [name for name in OF_DATA_SETS if getattr(data, name) != type(data).model_fields[name].default]
    if given:
        raise BadInput(
            f"data.{given[0]} is {getattr(data, given[0])!r}, which is for data sets, but {data.photos} is not one: "
            "leave it out, or name another data.source"
        )


def _scan(data: Data, subject: SubjectSettings) -> Scanned:
    further = tuple(name for name in data.caption_mix if name not in (OWN, TEMPLATES))
    options = SourceOptions(
        data.split, data.image_column, data.caption_column, data.streaming, workers_of(data), further
    )
    opened = open_source(subject.photos, data.source, options)
    if opened.table is not None:
        return _scan_table(data, subject, opened.table)
    with _in_folder(data, subject, opened.folder):
        photos, bad = _photos(opened.folder, data.skip_bad, workers_of(data))
        left_out = "; ".join(text for text in (bad, opened.unused) if text)
        masks = find_masks(opened.folder, photos, data.masks)
        words = Words("token", subject.class_noun, data.trigger)  # any word: the token is chosen with the base
        found = Scanned(subject, opened.folder, photos, masks, left_out)
        _captioned(data, found, words)
        emphasis_of(found)
        return found


def emphasis_of(found: Scanned) -> tuple[list[int], list[float]]:
    """How often each photo is in an epoch, and its loss weight, in the order of the photos.

    Raises:
        BadInput: a pattern fits no photo.
    """
    return emphasis(found.settings, [photo.path.name for photo in found.photos])


def emphasis(settings: SubjectSettings, names: Sequence[str]) -> tuple[list[int], list[float]]:
    """As `emphasis_of`, for the photos' names."""
    repeats = settings.repeats
    many = [repeats] * len(names) if isinstance(repeats, int) else by_pattern(repeats, names, 1, "data.repeats")
    weights = by_pattern(settings.weights, names, 1.0, "data.weights")
    if not any(weights):
        raise BadInput(f"data.weights gives every photo of {settings.photos} the weight 0: give one of them more")
    return many, weights


def _scan_table(data: Data, subject: SubjectSettings, table: Table) -> Scanned:
    if data.masks != "none":
        raise BadInput(
            f"data.masks is {data.masks} but {subject.photos} is a data set, which has no masks: leave it out, or "
            "give a folder of photos"
        )
    if table.bad and not data.skip_bad:
        raise BadInput(f"in {subject.photos} {table.sentence}; fix them, or leave them out with --skip-bad")
    if len(table.photos) > 1 and len({photo.digest for photo in table.photos}) == 1:
        raise BadInput(f"all {len(table.photos)} rows of {subject.photos} hold the same image: give different ones")
    left_out = f"{table.sentence}; they are left out" if table.bad else ""
    words = Words("token", subject.class_noun, data.trigger)  # any word: the token is chosen with the base
    found = Scanned(subject, subject.photos, table.photos, {}, left_out, table)
    _captioned(data, found, words)
    emphasis_of(found)
    return found


def _captioned(data: Data, found: Scanned, words: Words) -> list[Captioned]:
    if data.caption_mix and found.table is not None:
        held = dict(found.table.further)
        if OWN in data.caption_mix:
            held = {OWN: found.table.captions, **held}
        names = [photo.path.name for photo in found.photos]
        mixed = mix_rows(str(found.folder), names, held, data.caption_mix, data.templates)
        return caption_mixed(found.photos, mixed, words)
    if data.caption_mix:
        return caption_mixed(
            found.photos, mix_captions(found.folder, found.photos, data.caption_mix, data.templates), words
        )
    if found.table is not None:
        return caption_rows_of(
            found.photos, found.table.captions, captions=data.captions, templates=data.templates, words=words
        )
    return caption_photos(found.photos, captions=data.captions, templates=data.templates, words=words)


def workers_of(data: Data) -> int:
    """The number of threads that decode images."""
    return data.workers or min(core_count(), MOST_WORKERS)


@contextmanager
def _in_folder(data: Data, subject: SubjectSettings, folder: Path) -> Iterator[None]:
    """Adds the path that the user gave to an error that does not name it.

    That is an error about `folder` in the cache, or one of several subjects.
    """
    try:
        yield
    except BadInput as error:
        if folder != subject.photos:
            raise BadInput(f"in {subject.photos}: {str(error).replace(str(folder), subject.photos.name)}") from error
        named = error.path is not None and error.path.is_relative_to(subject.photos)
        if named or not data.subjects:
            raise
        raise BadInput(f"in {subject.photos}: {error}") from error


def _photos(folder: Path, skip_bad: bool, workers: int) -> tuple[list[Photo], str]:
    """The photos, and a sentence about the files that were left out."""
    found = scan_lenient(folder, workers)
    if found.bad and not skip_bad:
        raise BadInput(
            f"in {folder} {found.sentence}; fix or remove them, or leave them out with --skip-bad", path=folder
        )
    photos = found.photos
    if len(photos) > 1 and len({photo.digest for photo in photos}) == 1:
        raise BadInput(
            f"all {len(photos)} photos in {folder} are the same image: give different photos of the subject",
            path=folder,
        )
    return photos, f"{found.sentence}; they are left out" if found.bad else ""


def caption_subjects(recipe: Recipe, family: Family, scanned: Sequence[Scanned]) -> list[Subject]:
    """Chooses the token and the captions of every subject, in the order of `scanned`.

    Raises:
        BadInput: a token can't be used, or captions are missing or too long.
    """
    words = _tokens(recipe, family)
    subjects = [_caption(recipe, family, found, token) for found, token in zip(scanned, words, strict=True)]
    _refuse_no_tags(recipe.data, subjects)
    return subjects


def _refuse_no_tags(data: Data, subjects: Sequence[Subject]) -> None:
    texts = (text for subject in subjects for item in subject.captioned for text in item.captions)
    if data.shuffle_tags and all(tag_count(text) < data.keep_tags + 2 for text in texts):
        raise BadInput(
            f"data.shuffle_tags is on but no caption has two tags behind the first {data.keep_tags} (data.keep_tags), "
            "parts with commas between them: leave it out, or keep fewer"
        )


def _caption(recipe: Recipe, family: Family, found: Scanned, token: str) -> Subject:
    data, noun = recipe.data, found.settings.class_noun
    with _in_folder(data, found.settings, found.folder):
        words = Words(token, noun, data.trigger)
        captioned = _captioned(data, found, words)
        _refuse_long(recipe, family, captioned)
    summary = "; ".join(text for text in (summarise(captioned, words), found.left_out) if text)
    facts = found.table.facts if found.table else None
    trigger = words.fill(data.trigger)
    return Subject(token, noun, captioned, found.masks, summary, trigger=trigger, table=facts)


def refuse_unclear(subjects: Sequence[Subject]) -> None:
    """Raises: BadInput: a caption has the token but not the trigger, so its text without the trigger is not known."""
    for subject in subjects:
        unclear = [item.photo.path.name for item in subject.captioned if None in item.plain]
        if unclear:
            raise BadInput(
                f"the caption of {', '.join(unclear)} has the token {subject.token!r} but not the words of "
                f"data.trigger ({subject.trigger!r}), so prior.prompt can't leave these words out of it: write them "
                "exactly so, or leave the token out of the caption"
            )


def _refuse_long(recipe: Recipe, family: Family, captioned: list[Captioned]) -> None:
    """Refuses captions that are longer than the text encoders read."""
    if recipe.data.long_captions == "cut":
        return
    length = max(family.text_length(index) for index in range(len(family.tokenizers)))
    readers = [family.tokenizers[n] for n in range(len(family.tokenizers)) if family.text_length(n) == length]
    texts = list(dict.fromkeys(text for item in captioned for text in item.captions))
    cut = {text for tokenizer in readers for text in _longer(tokenizer, texts, length)}
    long = [item.photo.path.name for item in captioned if not cut.isdisjoint(item.captions)] if cut else []
    if long:
        raise BadInput(
            f"the captions of {_named(long)} are longer than the {length} tokens that the text encoder reads: "
            "shorten them, or set data.long_captions=cut"
        )


def _longer(tokenizer: Any, texts: Sequence[str], length: int) -> Iterator[str]:
    """The texts of more than `length` tokens."""
    for start in range(0, len(texts), TOGETHER):
        some = list(texts[start : start + TOGETHER])
        yield from (text for text, ids in zip(some, tokenizer(some)["input_ids"], strict=True) if len(ids) > length)


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST_NAMED]) + (f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else "")


def _tokens(recipe: Recipe, family: Family) -> list[str]:
    """Each subject's word in prompts: the method's own, the given token, or a rare one. All are different."""
    data = recipe.data
    own = recipe.method.add_subject_token(family, data.token, data.class_noun)
    if own is not None:
        return [own]  # `Recipe` refuses several subjects with such a method
    for subject in data.all_subjects:
        if subject.token != "auto":
            _refuse_pieces(family, subject.token, data.token_pieces)
    taken = {subject.token.lower() for subject in data.all_subjects if subject.token != "auto"}
    words = []
    for subject in data.all_subjects:
        word = _rare(family, subject.class_noun, taken) if subject.token == "auto" else subject.token
        taken.add(word.lower())
        words.append(word)
    return words


def _refuse_pieces(family: Family, token: str, most: int) -> None:
    pieces = max(tokens.describe(family.word_tokenizers, token).pieces, key=len)
    if len(pieces) > most:
        listed = " + ".join([*pieces[:12], *(["..."] if len(pieces) > 12 else [])])
        raise BadInput(
            f"the token {token!r} is {len(pieces)} pieces for this base ({listed}), each with its "
            f"own meaning: find one with `finetune tokens suggest`, or allow it with data.token_pieces={len(pieces)}"
        )


def _rare(family: Family, noun: str | None, taken: set[str]) -> str:
    """The best rare token that no other subject has. The words in `taken` are lower-case."""
    found = [text for text in suggested(family, len(taken) + 1, noun) if text not in taken]
    if not found:
        raise BadInput("no rare token was found in this base's tokenizer: give one with data.token=TOKEN")
    return found[0]
