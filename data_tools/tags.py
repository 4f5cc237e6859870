"""Changes captions that are lists of tags, in a new folder, or counts their tags."""

from __future__ import annotations

import argparse
import random
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from data_tools.photo_set import read_set
from data_tools.show import add_run, say, say_json, say_prepared, whole_number
from data_tools.wording import plain_tag, split_tags
from data_tools.work import Plan, Prepared, Step, carry_out, kept, refuse_place, with_caption
from finetune.core.errors import BadInput
from finetune.core.reading import read_utf8

MOST = 50  # lines of the table


@dataclass(frozen=True)
class TagRules:
    """What becomes of each caption's tags, in this order.

    `drop`: these tags go. `most`: only the first ones stay. `shuffle`: their order is drawn with `seed` and the
    photo's name, behind the first `keep_first`. Tags of `drop` are compared in lower case, with spaces for
    underscores.
    """

    drop: tuple[str, ...] = ()
    most: int | None = None
    shuffle: bool = False
    keep_first: int = 0
    seed: int = 0


@dataclass(frozen=True)
class TagCount:
    """A tag as it is compared, and the number of photos that have it."""

    tag: str
    photos: int


def tags(source: Path, out: Path, rules: TagRules, dry_run: bool = False) -> Prepared:
    """Copies the photos of `source` to the new folder `out` with captions changed by the rules.

    A photo without a caption is copied as it is. A caption of which nothing is left is not written.

    Raises:
        BadInput: no photo has a caption, the rules change nothing, or `out` can't be written.
    """
    refuse_place(source, out)
    photos = read_set(source)
    _refuse_uncaptioned(source, [entry.caption for entry in photos.entries])
    steps = []
    for entry in photos.entries:
        step = kept(photos, entry)
        new = change(entry.caption, rules, entry.name) if entry.caption else entry.caption
        if new != entry.caption and step.files:
            step = with_caption(step, entry, new or None)
            step = Step(step.source, "captioned anew", new or "no tag is left", step.files, step.caption, step.row)
        steps.append(step)
    if all(step.action == "copied" for step in steps):
        raise BadInput(f"these rules change no caption of {source}: give --drop, --blacklist, --most or --shuffle")
    settings = asdict(rules) | {"drop": list(rules.drop)}
    return carry_out(Plan("tags", source, steps, settings, photos.notes), out, dry_run)


def change(caption: str, rules: TagRules, name: str) -> str:
    """Returns a caption changed by the rules. The same name and seed give the same order."""
    unwanted = {plain_tag(tag) for tag in rules.drop}
    found = [tag for tag in split_tags(caption) if plain_tag(tag) not in unwanted]
    found = found[: rules.most]
    if rules.shuffle:
        rest = found[rules.keep_first :]
        random.Random(f"{rules.seed}:{name}").shuffle(rest)
        found = [*found[: rules.keep_first], *rest]
    return ", ".join(found)


def frequencies(source: Path) -> list[TagCount]:
    """Returns the tags of all captions, the most frequent first.

    Raises:
        BadInput: no photo has a caption.
    """
    photos = read_set(source)
    captions = [entry.caption for entry in photos.entries]
    _refuse_uncaptioned(source, captions)
    counted = Counter(tag for text in captions if text for tag in {plain_tag(tag) for tag in split_tags(text)})
    return [TagCount(tag, count) for tag, count in sorted(counted.items(), key=lambda item: (-item[1], item[0]))]


def _refuse_uncaptioned(source: Path, captions: list[str | None]) -> None:
    if not any(captions):
        raise BadInput(f"no photo in {source} has a caption: put a .txt with tags beside each", path=source)


def options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `tags`."""
    parser.add_argument("photos", type=Path, metavar="PHOTOS", help="a folder of photos; it stays as it is")
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help="a new folder; without it, tags are counted")
    parser.add_argument(
        "--drop", action="append", default=[], metavar="TAG", help="a tag to leave out; may be repeated"
    )
    parser.add_argument(
        "--blacklist", type=Path, metavar="FILE", help="a text file with a tag to leave out in each line"
    )
    parser.add_argument("--most", type=whole_number(1, "tags"), metavar="N", help="only the first N tags stay")
    parser.add_argument("--shuffle", action="store_true", help="draw the order of the tags")
    parser.add_argument(
        "--keep-first",
        type=whole_number(0, "tags"),
        default=0,
        metavar="N",
        help="tags that --shuffle leaves in front",
    )
    parser.add_argument("--seed", type=whole_number(0, "seeds"), default=0, help="of --shuffle (default: 0)")
    add_run(parser)


def run(options: argparse.Namespace) -> int:
    """Counts or changes tags."""
    drop = [*options.drop, *(_lines(options.blacklist) if options.blacklist else [])]
    rules = TagRules(tuple(drop), options.most, options.shuffle, options.keep_first, options.seed)
    if options.out is not None:
        if rules.keep_first and not rules.shuffle:
            raise BadInput("--keep-first has no effect without --shuffle: add it, or leave both out")
        return say_prepared(tags(options.photos, options.out, rules, options.dry_run), options.json)
    if rules != TagRules():
        raise BadInput("these options change captions, for which OUT is missing: give a new folder")
    return _say_counts(frequencies(options.photos), options.json)


def _lines(file: Path) -> list[str]:
    try:
        return [line.strip() for line in read_utf8(file).splitlines() if line.strip()]
    except OSError as error:
        raise BadInput(f"--blacklist {file} can't be read ({error.strerror}): give a text file", path=file) from error


def _say_counts(counts: list[TagCount], as_json: bool) -> int:
    if as_json:
        say_json([asdict(item) for item in counts])
        return 0
    for item in counts[:MOST]:
        say(f"{item.photos:>7}  {item.tag}")
    say(f"{len(counts)} tags" + (f"; the first {MOST} are shown, --json has all" if len(counts) > MOST else ""))
    return 0
