"""Writes a folder without copies and near-copies: of photos that look the same, the largest stays."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.hashes import NEAR, Look, Pair, look_of, near_pairs
from data_tools.photo_set import Entry, PhotoSet, name_rank, read_set
from data_tools.show import add_folders, say_prepared, whole_number
from data_tools.work import Plan, Prepared, Step, carry_out, kept, refuse_place, with_caption
from finetune.core.events import phase
from finetune.data.photos import BadImage, read_image


@dataclass(frozen=True)
class Seen:
    """A photo that could be read: what it looks like, and its pixels and bytes, by which the best copy is chosen."""

    entry: Entry
    look: Look
    pixels: int
    size: int

    @property
    def rank(self) -> tuple[int, int, bool, tuple[bool, str, str]]:
        """Sorts the best first."""
        return (-self.pixels, -self.size, self.entry.caption is None, name_rank(self.entry.name))


def dedupe(source: Path, out: Path, near: int = NEAR, dry_run: bool = False) -> Prepared:
    """Copies the photos of `source` to the new folder `out`, of those that look the same only the largest.

    Two photos look the same if at most `near` of 64 dHash bits differ and their small images agree. A photo that stays
    and has no caption gets the one of its copy. Files that can't be read are left out and named.

    Raises:
        BadInput: there are no photos, or `out` can't be written.
    """
    refuse_place(source, out)
    photos = read_set(source)
    seen, bad = _look(photos)
    looks = [item.look for item in seen]
    best = _best(looks, near_pairs(looks, near), seen)
    copies: dict[int, list[Seen]] = {}
    for item, stays in zip(seen, best, strict=True):
        copies.setdefault(stays, []).append(item)
    steps = {
        item.entry.name: _step(photos, item, copies[number]) if stays == number else _left_out(item, seen[stays])
        for number, (item, stays) in enumerate(zip(seen, best, strict=True))
    }
    steps |= {name: Step(photos.folder / name, "left out", reason) for name, reason in bad.items()}
    plan = Plan("dedupe", source, [steps[entry.name] for entry in photos.entries], {"near": near}, photos.notes)
    return carry_out(plan, out, dry_run)


def _look(photos: PhotoSet) -> tuple[list[Seen], dict[str, str]]:
    seen, bad = [], {}
    with phase("Looking", len(photos.entries), "photos") as advance:
        for entry in photos.entries:
            try:
                photo, image = read_image(entry.path)
                width, height = photo.size
                seen.append(Seen(entry, look_of(image), width * height, entry.path.stat().st_size))
            except BadImage as fault:
                bad[entry.name] = fault.reason
            advance(1, "")
    return seen, bad


def _best(looks: Sequence[Look], pairs: Sequence[Pair], seen: Sequence[Seen]) -> list[int]:
    """For each photo the number of the one that stays in its place: its own, or that of a better copy.

    A photo goes only for one that it looks like itself: of a chain, both ends may stay.
    """
    beside: dict[int, list[int]] = {}
    for pair in pairs:
        beside.setdefault(pair.first, []).append(pair.second)
        beside.setdefault(pair.second, []).append(pair.first)
    best = [-1] * len(looks)
    for number in sorted(range(len(looks)), key=lambda number: seen[number].rank):
        stays = [other for other in beside.get(number, ()) if best[other] == other]
        best[number] = min(stays, key=lambda other: seen[other].rank) if stays else number
    return best


def _left_out(item: Seen, best: Seen) -> Step:
    return Step(item.entry.path, "left out", f"looks the same as {best.entry.name}, which is larger or first")


def _step(photos: PhotoSet, item: Seen, copies: Sequence[Seen]) -> Step:
    """The photo stays. If it has no caption it gets the first one of its `copies`."""
    step = kept(photos, item.entry)
    found = next((copy.entry.caption for copy in copies if copy.entry.caption), None)
    return step if item.entry.caption or found is None else with_caption(step, item.entry, found)


def options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `dedupe`."""
    add_folders(parser)
    parser.add_argument(
        "--near", type=whole_number(0, "bits"), default=NEAR, help=f"of 64 hash bits may differ (default: {NEAR})"
    )


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    return say_prepared(dedupe(options.photos, options.out, options.near, options.dry_run), options.json)
