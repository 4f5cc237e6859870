"""Writes a folder without copies and near-copies: of photos that look the same, the largest stays.

Photos look the same by perceptual hashes and, where a network is given, by its features too.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.hashes import NEAR, Look, look_of, near_pairs
from data_tools.photo_set import Entry, PhotoSet, name_rank, read_set
from data_tools.show import add_folders, say_prepared, whole_number
from data_tools.work import Plan, Prepared, Step, carry_out, kept, refuse_place, with_caption
from finetune.core.errors import BadInput
from finetune.core.events import phase
from finetune.data.decoding import BadImage
from finetune.data.photos import read_image

if TYPE_CHECKING:
    from data_tools.embeddings import Embedder


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


@dataclass(frozen=True)
class SameBy:
    """When two photos are the same: at most `near` of 64 dHash bits differ and their small images agree, or the cosine
    of the features that `embedder` gives them is at least `alike` (None: what suits its kind)."""

    near: int = NEAR
    embedder: Embedder | None = None
    alike: float | None = None

    @property
    def settings(self) -> dict[str, object]:
        """For the manifest, with the SHA-256 of the network's files."""
        if self.embedder is None:
            return {"near": self.near}
        network = self.embedder.network
        return {"near": self.near, "embedder": network.name, "sha256": network.hash, "alike": self.least}

    @property
    def least(self) -> float:
        """The cosine from which features are the same; 2, which none reaches, without a network."""
        if self.embedder is None:
            return 2.0
        return self.embedder.alike if self.alike is None else self.alike


USUAL = SameBy()


def dedupe(source: Path, out: Path, same: SameBy = USUAL, dry_run: bool = False) -> Prepared:
    """Copies the photos of `source` to the new folder `out`, of those that look the same only the largest.

    `same` says when two photos look the same. A photo that stays and has no caption gets the one of its copy. Files
    that can't be read are left out and named.

    Raises:
        BadInput: there are no photos, `same.alike` is no cosine above 0, or `out` can't be written.
    """
    if same.alike is not None and not 0 < same.alike <= 1:
        raise BadInput(f"--alike is {same.alike:g}, not a cosine: give a number above 0 and at most 1, such as 0.9")
    refuse_place(source, out)
    photos = read_set(source)
    seen, bad = _look(photos)
    cosines = _cosines(seen, same)
    pairs = [(pair.first, pair.second) for pair in near_pairs([item.look for item in seen], same.near)]
    best = _best([*pairs, *cosines], seen)
    copies: dict[int, list[Seen]] = {}
    for item, stays in zip(seen, best, strict=True):
        copies.setdefault(stays, []).append(item)
    steps = {
        item.entry.name: _step(photos, item, copies[number])
        if stays == number
        else _left_out(item, seen[stays], cosines.get((min(number, stays), max(number, stays))))
        for number, (item, stays) in enumerate(zip(seen, best, strict=True))
    }
    steps |= {name: Step(photos.folder / name, "left out", reason) for name, reason in bad.items()}
    plan = Plan("dedupe", source, [steps[entry.name] for entry in photos.entries], same.settings, photos.notes)
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


def _cosines(seen: Sequence[Seen], same: SameBy) -> dict[tuple[int, int], float]:
    """The pairs of photos that are the same by their features, with their cosines."""
    if same.embedder is None or len(seen) < 2:
        return {}
    from data_tools.embeddings import alike_pairs

    values = same.embedder.see([item.entry.path for item in seen])
    return {(first, second): cosine for first, second, cosine in alike_pairs(values, same.least)}


def _best(pairs: Sequence[tuple[int, int]], seen: Sequence[Seen]) -> list[int]:
    """For each photo the number of the one that stays in its place: its own, or that of a better copy.

    A photo goes only for one that it looks like itself: of a chain, both ends may stay.
    """
    beside: dict[int, list[int]] = {}
    for first, second in pairs:
        beside.setdefault(first, []).append(second)
        beside.setdefault(second, []).append(first)
    best = [-1] * len(seen)
    for number in sorted(range(len(seen)), key=lambda number: seen[number].rank):
        stays = [other for other in beside.get(number, ()) if best[other] == other]
        best[number] = min(stays, key=lambda other: seen[other].rank) if stays else number
    return best


def _left_out(item: Seen, best: Seen, cosine: float | None) -> Step:
    by = "" if cosine is None else f" (cosine of features {cosine:.2f})"
    return Step(item.entry.path, "left out", f"looks the same as {best.entry.name}{by}, which is larger or first")


def _step(photos: PhotoSet, item: Seen, copies: Sequence[Seen]) -> Step:
    """The photo stays. If it has no caption it gets the first one of its `copies`."""
    step = kept(photos, item.entry)
    found = next((copy.entry.caption for copy in copies if copy.entry.caption), None)
    return step if item.entry.caption or found is None else with_caption(step, item.entry, found)


def options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `dedupe`."""
    add_folders(parser)
    parser.add_argument(
        "--near",
        type=whole_number(0, "bits"),
        default=NEAR,
        help=f"photos with at most this many of 64 hash bits different are near-copies (default: {NEAR})",
    )
    parser.add_argument(
        "--embedder",
        metavar="FOLDER|FILE|ID",
        help="also compare the features of this network: DINO, DINOv2 or DINOv3, or a TorchScript file of SSCD",
    )
    parser.add_argument(
        "--alike",
        type=float,
        metavar="COSINE",
        help="photos whose features have at least this cosine are the same (default: SSCD .75, DINO .95)",
    )


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    same = SameBy(options.near, _embedder_of(options), options.alike)
    return say_prepared(dedupe(options.photos, options.out, same, options.dry_run), options.json)


def _embedder_of(options: argparse.Namespace) -> Embedder | None:
    if options.embedder is None:
        if options.alike is not None:
            raise BadInput("--alike is the cosine of a network's features: give the network with --embedder")
        return None
    from finetune.core.logging import quiet_import

    with quiet_import():
        from data_tools.embeddings import Embedder
    return Embedder(options.embedder)
