"""Writes a folder of photos for training and one of held-out photos, chosen by their content."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_tools.hashes import look_of, near_pairs
from data_tools.photo_set import PhotoSet, read_set
from data_tools.show import add_folders, say_prepared, whole_number
from data_tools.work import Plan, Prepared, Step, carry_out, kept, refuse_place
from finetune.core.errors import BadInput
from finetune.core.events import phase
from finetune.data.decoding import BadImage
from finetune.data.photos import read_image

TRAIN, HELD_OUT = "train", "held_out"


def split(source: Path, out: Path, hold_out: int, dry_run: bool = False) -> Prepared:
    """Copies the photos of `source` to `out`/train, and `hold_out` of them to `out`/held_out.

    The rule: photos are sorted by the SHA-256 of their files and the first ones are held out. So the choice is the
    same on every machine, and a photo that is added later changes it little. A photo that looks the same as another
    one is never held out: training would see it.

    Raises:
        BadInput: there are too few photos that look like no other one, or `out` can't be written.
    """
    refuse_place(source, out)
    photos = read_set(source)
    digests, bad = _candidates(photos)
    if hold_out > len(digests) or hold_out >= len(photos.entries) - len(bad):
        raise BadInput(
            f"--hold-out is {hold_out} but of {len(photos.entries)} photos in {source} {len(digests)} look like no "
            "other one, and at least one photo must be left for training: hold out fewer"
        )
    held = set(sorted(digests, key=lambda name: digests[name])[:hold_out])
    steps = []
    for entry in photos.entries:
        if entry.name in bad:
            steps.append(Step(entry.path, "left out", bad[entry.name]))
        elif entry.name in held:
            steps.append(kept(photos, entry, "held out", "", HELD_OUT))
        else:
            steps.append(kept(photos, entry, "for training", "", TRAIN))
    return carry_out(Plan("split", source, steps, {"hold_out": hold_out}, photos.notes), out, dry_run)


def _candidates(photos: PhotoSet) -> tuple[dict[str, str], dict[str, str]]:
    """Name -> SHA-256 of the photos that look like no other one, and name -> reason of those that can't be read."""
    names, looks, digests, bad = [], [], [], {}
    with phase("Looking", len(photos.entries), "photos") as advance:
        for entry in photos.entries:
            try:
                photo, image = read_image(entry.path)
                names.append(entry.name)
                looks.append(look_of(image))
                digests.append(photo.digest)
            except BadImage as fault:
                bad[entry.name] = fault.reason
            advance(1, "")
    doubled = {number for pair in near_pairs(looks) for number in (pair.first, pair.second)}
    alone = {name: digests[number] for number, name in enumerate(names) if number not in doubled}
    return alone, bad


def options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `split`."""
    add_folders(parser)
    parser.add_argument(
        "--hold-out", type=whole_number(1, "photos"), required=True, metavar="N", help="this many photos are held out"
    )


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    return say_prepared(split(options.photos, options.out, options.hold_out, options.dry_run), options.json)
