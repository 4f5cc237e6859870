"""RUN/inputs.json: what a run was made from, by content. Resume compares, and refuses by naming what changed.

Paths are not compared: photos may move, and are put into the recorded order by their digests.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from finetune.core.errors import BadInput
from finetune.core.files import write_json
from finetune.core.reading import read_json
from finetune.core.records import LaterVersion, migrated
from finetune.runs.plan import Record

SCHEMA = 1
FILE = "inputs.json"
DIGITS = 16  # of an image's SHA-256: enough to find it again
MOST_IMAGES = 1_000_000  # of a data set: a JSON file has a limit
MAX_BYTES = 1_000_000_000  # of the file: a photo takes about 250, and what was written must be read again
SHOWN = 5  # changes that a message names; the rest is counted


class PinnedPhoto(Record):
    """`name`: its file's, for messages. `sha256`: of the file. `captions`: as they are trained; of many photos their
    `caption_pin`. `beside`: what lies beside it (its mask, a depth map, ...) -> SHA-256 of that file. `repeats` and
    `weight`: by its name, which may change."""

    name: str
    sha256: str
    captions: list[str]
    beside: dict[str, str] = {}
    repeats: int = 1
    weight: float = 1.0


class PinnedTable(Record):
    """A data set. `name`: for messages. `files`: its file -> SHA-256. `revision`: of one from the hub, its id and
    commit. `columns`: which are read. `content`: SHA-256 over all of its images and captions; `captions`: over those
    that are trained. `token`: of its subject. `images`: `told_images` of those that are trained on; empty in older
    records and for more than `MOST_IMAGES`."""

    name: str
    files: dict[str, str] = {}
    revision: str = ""
    split: str = ""
    columns: dict[str, str] = {}
    rows: int = 0
    content: str = ""
    captions: str = ""
    token: str = ""
    images: str = ""


class RunInputs(Record):
    """
    photos: in the order of the run; without the rows of data sets.
    tables: the data sets, in the order of their subjects.
    class_images: class prompt -> SHA-256 of each image, in their order; empty before they are drawn.
    others: [prompt, SHA-256] of each image of everything else, in their order; empty before they are drawn.
    base: file of the base, below its folder -> SHA-256.
    packages: package -> version.
    tokens: of each subject.
    sample: the files that the run's images are drawn from, where the recipe names some: "image", ... -> SHA-256.
    precision: what run.precision=auto became; empty in records of older versions.
    """

    photos: list[PinnedPhoto] = []
    tables: list[PinnedTable] = []
    class_images: dict[str, list[str]] = {}
    others: list[list[str]] = []
    base: dict[str, str] = {}
    packages: dict[str, str] = {}
    tokens: list[str] = []
    sample: dict[str, str] = {}
    precision: str = ""


class Accepted(Record):
    """Changes that a person accepted with --accept-changes: the run is not what it was from `step` on."""

    step: int
    changes: list[str]


class InputsRecord(Record):
    inputs: RunInputs
    accepted: list[Accepted] = []


def read_inputs(run: Path) -> InputsRecord | None:
    """What the run in this folder was made from; None for a run of a version that did not record it.

    Raises:
        BadInput: the file is damaged, or a later version wrote it.
    """
    file = run / FILE
    if not file.is_file():
        return None
    try:
        values = read_json(file, dict, limit=MAX_BYTES)
        return InputsRecord.model_validate(migrated(values, file, SCHEMA, []))
    except LaterVersion:
        raise
    except (BadInput, ValidationError, AttributeError, TypeError) as error:
        raise BadInput(
            f"{file} is damaged, so nothing can tell whether the run's photos and base are the same: give the run's "
            "own file back, or start a new run"
        ) from error


def write_inputs(run: Path, record: InputsRecord) -> None:
    write_json(run / FILE, {"schema": SCHEMA, **record.model_dump(mode="json")})


def in_recorded_order(digests: Sequence[str], recorded: RunInputs) -> list[int]:
    """Where each recorded photo is now: an order in which photos that moved or were renamed are trained as before.

    Photos that are not in the record come last, in the order that they have.
    """
    places: dict[str, deque[int]] = defaultdict(deque)
    for index, digest in enumerate(digests):
        places[digest].append(index)
    order = [left.popleft() for photo in recorded.photos if (left := places.get(photo.sha256))]
    return order + sorted(index for left in places.values() for index in left)


def told_images(digests: Sequence[str]) -> str:
    """The beginning of each image's SHA-256 in one text; "" for too many."""
    return "".join(digest[:DIGITS] for digest in digests) if len(digests) <= MOST_IMAGES else ""


def trained_images(inputs: RunInputs, names: Sequence[str], held_out: Collection[str]) -> set[str] | None:
    """The beginning of the SHA-256 of each image that was trained on; None if the record does not tell.

    names: of `inputs.photos`, as `held_out` names them.
    """
    if not all(table.images for table in inputs.tables):
        return None
    pairs = zip(inputs.photos, names, strict=True)
    found = {photo.sha256[:DIGITS] for photo, name in pairs if name not in held_out}
    for table in inputs.tables:
        found |= {table.images[start : start + DIGITS] for start in range(0, len(table.images), DIGITS)}
    return found


def caption_pin(captions: list[str]) -> list[str]:
    """A SHA-256 in place of a photo's captions; of one, itself. The captions of 100,000 photos would take more than a
    JSON file may have."""
    if len(captions) == 1 and re.fullmatch(r"sha256:[0-9a-f]{64}", captions[0]):
        return captions
    return ["sha256:" + hashlib.sha256(json.dumps(captions).encode()).hexdigest()]


def changes(recorded: RunInputs, now: RunInputs) -> list[str]:
    """What is not as it was, each with its name; empty where all is the same."""
    return [
        *_changed_photos(recorded.photos, now.photos),
        *_changed_tables(recorded.tables, now.tables),
        *_changed_class_images(recorded.class_images, now.class_images),
        *_changed_others(recorded.others, now.others),
        *_changed_files(recorded.base, now.base),
        *_changed_versions(recorded.packages, now.packages),
        *([f"the token {now.tokens} was {recorded.tokens}"] if recorded.tokens != now.tokens else []),
        *(f"sample.{name} changed" for name in now.sample if recorded.sample.get(name) != now.sample[name]),
        *_changed_precision(recorded.precision, now.precision),
    ]


def refusal(run: Path, changed: Sequence[str]) -> str:
    """The sentence that refuses to go on with changed inputs."""
    shown = "; ".join(changed[:SHOWN])
    more = f"; and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
    return (
        f"{run} was begun with other inputs ({shown}{more}): give the old ones back, start a new run, or go on with "
        "the new ones with --accept-changes, which is written into the run's record"
    )


def _changed_photos(recorded: Sequence[PinnedPhoto], now: Sequence[PinnedPhoto]) -> Iterator[str]:
    before, after = Counter(p.sha256 for p in recorded), Counter(p.sha256 for p in now)
    gone = _names(recorded, before - after)
    new = _names(now, after - before)
    edited = set(gone) & set(new)
    yield from (f"the photo {name} is not the same image" for name in gone if name in edited)
    yield from (f"the photo {name} is gone" for name in gone if name not in edited)
    yield from (f"the photo {name} is new" for name in new if name not in edited)
    if before == after and [p.sha256 for p in recorded] != [p.sha256 for p in now]:
        yield "the photos come in another order"
    for old, photo in _pairs(recorded, now, edited):
        if old.captions != photo.captions and caption_pin(old.captions) != caption_pin(photo.captions):
            yield f"the caption of {photo.name} changed"
        if (old.repeats, old.weight) != (photo.repeats, photo.weight):
            yield f"the repeats or the weight of {photo.name} changed"
        kinds = sorted(old.beside.keys() | photo.beside.keys())
        yield from (f"the {k} of {photo.name} changed" for k in kinds if old.beside.get(k) != photo.beside.get(k))


def _changed_tables(recorded: Sequence[PinnedTable], now: Sequence[PinnedTable]) -> Iterator[str]:
    if len(recorded) != len(now):
        yield f"there are {len(now)} data sets and were {len(recorded)}"
        return
    for old, table in zip(recorded, now, strict=True):
        named = f"the data set {table.name}"
        names = sorted(old.files.keys() | table.files.keys())
        files = [name for name in names if old.files.get(name) != table.files.get(name)]
        yield from (f"the file {name} of {named} {_what_happened(name, old, table)}" for name in files)
        if old.revision != table.revision:
            yield f"{named} is {table.revision or 'no longer from the hub'} and was {old.revision or 'local'}"
        for what, before, after in (("split", old.split, table.split), ("columns", old.columns, table.columns)):
            if before != after:
                yield f"the {what} of {named} is {after} and was {before}"
        same_files = not files and old.revision == table.revision
        if same_files and (old.content, old.rows) != (table.content, table.rows):
            yield f"the images or captions of {named} changed"
        elif same_files and old.captions != table.captions:
            yield f"the captions of {named} changed"


def _what_happened(name: str, old: PinnedTable, now: PinnedTable) -> str:
    return "is gone" if name not in now.files else "is new" if name not in old.files else "changed"


def _pairs(
    recorded: Sequence[PinnedPhoto], now: Sequence[PinnedPhoto], edited: Collection[str]
) -> Iterator[tuple[PinnedPhoto, PinnedPhoto]]:
    """Each recorded photo that is still there, with what it is now: found by content, an `edited` one by its name."""
    taken: set[int] = set()
    found: dict[int, PinnedPhoto] = {}
    for field, wanted in (("sha256", None), ("name", edited)):
        places: dict[str, deque[int]] = defaultdict(deque)
        for place, photo in enumerate(now):
            if place not in taken:
                places[getattr(photo, field)].append(place)
        for number, old in enumerate(recorded):
            left = places.get(getattr(old, field))
            if left and number not in found and (wanted is None or old.name in wanted):
                taken.add(left[0])
                found[number] = now[left.popleft()]
    yield from ((recorded[number], found[number]) for number in sorted(found))


def _names(photos: Sequence[PinnedPhoto], digests: Counter[str]) -> list[str]:
    left, names = Counter(digests), []
    for photo in photos:
        if left[photo.sha256] > 0:
            left[photo.sha256] -= 1
            names.append(photo.name)
    return names


def _changed_class_images(recorded: Mapping[str, list[str]], now: Mapping[str, list[str]]) -> Iterator[str]:
    """Sets that both have: before they are drawn there is nothing to compare."""
    for prompt in recorded.keys() & now.keys():
        old, images = recorded[prompt], now[prompt]
        different = sum(a != b for a, b in zip(old, images, strict=False)) + abs(len(old) - len(images))
        if different:
            yield f"{different} of the class images of {prompt!r} changed"


def _changed_others(recorded: Sequence[list[str]], now: Sequence[list[str]]) -> Iterator[str]:
    """Where both have some: before they are drawn there is nothing to compare."""
    different = sum(a != b for a, b in zip(recorded, now, strict=False)) + abs(len(recorded) - len(now))
    if recorded and now and different:
        yield f"{different} of the images of everything else (prior.others) changed"


def _changed_files(recorded: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    for name in sorted(recorded.keys() | now.keys()):
        if name not in now:
            yield f"the base's file {name} is gone"
        elif name not in recorded:
            yield f"the base's file {name} is new"
        elif recorded[name] != now[name]:
            yield f"the base's file {name} changed"


def _changed_versions(recorded: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    """Of the packages in the record: older versions recorded fewer."""
    for name in sorted(recorded):
        if recorded[name] != now.get(name):
            yield f"{name} is {now.get(name, 'not installed')} and was {recorded[name]}"


def _changed_precision(recorded: str, now: str) -> Iterator[str]:
    if recorded and recorded != now:
        yield f"the precision is {now} here and was {recorded}"
