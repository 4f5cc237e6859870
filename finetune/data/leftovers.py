"""What lies in a folder of photos and is not used: a person should hear of it."""

from __future__ import annotations

from collections.abc import Sequence, Set
from pathlib import Path

from finetune.data.decoding import shown

SHOWN = 5  # names in a sentence
MANIFEST = "data-manifest.json"  # `finetune data` says there what it did: nothing that training should read


def leftovers(folder: Path, used: Set[Path]) -> list[str]:
    """The names in a folder that are not among the `used` files, sorted; sub-folders end in "/".

    A sub-folder of which something is used (masks/) is looked into. Hidden files and the manifest of
    `finetune data` are left out.
    """
    inside = {file.parent for file in used}
    names = []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or entry.name == MANIFEST or entry in used:
            continue
        if entry in inside:
            names += [f"{shown(entry.name)}/{name}" for name in leftovers(entry, used)]
        else:
            names.append(shown(entry.name) + ("/" if entry.is_dir() else ""))
    return names


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many there are."""
    if len(names) <= SHOWN:
        return ", ".join(names)
    return f"{', '.join(names[:SHOWN])} and {len(names) - SHOWN} more ({len(names)} in all)"
