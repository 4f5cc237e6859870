"""Work that a page asks for, in a process of its own: `python -m finetune.ui.chores NAME`, with JSON in and out.

So a broken image or a large model never takes the server with it, and the server imports no model library. Lines are
{"progress": [done, total, unit]}, and at last {"result": ...} or {"error": "one sentence"}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from finetune.core.errors import BadInput, CheckFailed
from finetune.core.events import Event, PhaseAdvanced, PhaseStarted, sent_to
from finetune.core.reading import parse_json
from finetune.ui.lora_work import convert_lora, merge_loras, verify_lora
from finetune.ui.photo_work import small_copies, try_changes
from finetune.ui.prompt_box import draw_wish
from finetune.ui.pushing import push_run

Chore = Callable[[Mapping[str, Any]], Any]


def check_photos(given: Mapping[str, Any]) -> Any:
    """What `finetune data check` finds, photo by photo; makes the small copies too."""
    from data_tools.check import check

    found = check(Path(given["photos"]), int(given.get("resolution") or 512)).values()
    small = Path(given["small"])
    files: Any = found["files"]
    for item in files:
        item["shown"] = small_copies(Path(given["photos"]) / item["name"], small)
    found.pop("folder")
    return found


def unpack_zip(given: Mapping[str, Any]) -> Any:
    """Adds the photos of a zip file to a set. Returns the names of what was added, and of what was not used."""
    import shutil
    import zipfile

    from finetune.data.sources.base import is_usable
    from finetune.data.sources.zip import Zip
    from finetune.ui.uploads import LARGEST_PHOTO, LARGEST_ZIP, MOST_FILES, SPARE, place_beside, safe_name

    file, folder, shown = Path(given["zip"]), Path(given["photos"]), str(given["name"])
    try:
        with zipfile.ZipFile(file) as held:
            sizes = [entry.file_size for entry in held.infolist()]
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise BadInput(f"{shown} is not a complete zip file: create it again") from error
    there = sum(1 for _ in folder.iterdir())
    if there + len(sizes) > MOST_FILES or sum(sizes) > LARGEST_ZIP or max(sizes, default=0) > LARGEST_PHOTO:
        raise BadInput(
            f"{shown} holds {len(sizes)} files of {sum(sizes) / 1e6:,.0f} MB, too much for photos: send fewer"
        )
    if shutil.disk_usage(folder).free < SPARE + sum(sizes):
        raise BadInput(f"the disk is nearly full, so {shown} was not unpacked: free some space")
    added, unused = [], []
    for number, (name, content) in enumerate(Zip().files(file)):
        if not is_usable(name):
            unused.append(name)
            continue
        arrived = file.with_name(f"{file.name}.{number}")
        arrived.write_bytes(content)
        try:
            added.append(place_beside(arrived, folder, safe_name(name)))
        finally:
            arrived.unlink(missing_ok=True)
    if not added:
        raise BadInput(f"{shown} holds no photos: send another one")
    return {"added": added, "unused": unused[:20]}


def inspect_base(given: Mapping[str, Any]) -> Any:
    """What `finetune inspect` says of a base."""
    from finetune.export.card import licence_of
    from finetune.families.facts import facts
    from finetune.families.source import resolve_base

    folder = resolve_base(given["base"], like=given.get("like") or None, weights=False)
    found = facts(folder) | {"licence": licence_of(folder) or "not stated in its folder"}
    return {"rows": [[name, str(value)] for name, value in found.items()], "resolution": _number(found)}


def _number(found: Mapping[str, str]) -> int | None:
    text = str(found.get("resolution", "")).split(" ")[0]
    return int(text) if text.isdecimal() else None


def plan_run(given: Mapping[str, Any]) -> Any:
    """The plan of a run, as `--dry-run` prints it, in plain words first; and whether it fits this machine."""
    from finetune.config.load import load_recipe
    from finetune.jobs.plan import plan
    from finetune.jobs.train import check_run
    from finetune.runs.plan import plan_rows

    recipe = load_recipe(given["recipe"], given["settings"])
    found = plan(check_run(recipe))
    listed = {name: value if isinstance(value, list) else [value] for name, value in plan_rows(found).items()}
    rows = [[name, ", ".join(map(str, value))] for name, value in listed.items() if value not in ([None], [""], [])]
    return {
        "words": _in_words(found, recipe),
        "warnings": toy_words(found),
        "rows": rows,
        "fits": _fitting(recipe),
        "steps": found.steps,
        "batch_size": found.batch_size,
    }


def _in_words(plan: Any, recipe: Any) -> list[str]:
    """The plan as sentences."""
    photos = sum(subject.photos for subject in plan.subjects)
    called = " and ".join(subject.style or subject.words for subject in plan.subjects)
    kind = "drawings" if plan.subjects[0].style else "photos"
    words = [f"It learns “{called}” from {photos} {kind}. Write these words in a prompt to get it."]
    words.append(
        f"{plan.steps} steps of {plan.batch_size}: each of your {kind} is seen about {plan.times_seen:.0f} times."
    )
    if plan.class_images:
        words.append(
            f"First the base draws {plan.class_images.count} images of its own, so that it keeps what it knows about "
            "other things of the same kind."
        )
    if recipe.sample.every:
        words.append(
            f"Every {recipe.sample.every} steps it draws the same prompts at the same seeds, for you to compare."
        )
    return words


def toy_words(plan: Any) -> list[str]:
    """What a person must know who teaches the built-in base a thing of a kind that it has never seen."""
    from finetune.families.toy import KINDS, unknown_to

    unknown = unknown_to(plan.base, [subject.noun for subject in plan.subjects])
    known = f"{', '.join(KINDS[:-1])} and {KINDS[-1]}"
    return [
        f"The built-in toy has only seen {known}. It has never seen a {noun}, so nothing that it draws will look like "
        "your photos: choose another base for them."
        for noun in unknown
    ]


def _fitting(recipe: Any) -> dict[str, Any]:
    """Bytes that a step needs, those that the GPU has (None: there is none), and what to set if it has too few."""
    import torch

    from finetune.jobs.estimate import estimate

    needed = estimate(recipe).total
    if not torch.cuda.is_available():
        return {"needed": needed, "there": None, "fits": None, "lever": ""}
    there = torch.cuda.get_device_properties(0).total_memory - 0.6e9  # the CUDA context
    lever = ""
    if needed > there:
        light = estimate(recipe, checkpointing=True).total
        lever = "run.gradient_checkpointing=true" if light <= there else "run.batch_size=1, then method.rank=4"
    return {"needed": needed, "there": there, "fits": needed <= there, "lever": lever}


def export_step(given: Mapping[str, Any]) -> Any:
    """Exports a checkpoint of a run, checked, and returns what was written."""
    from finetune.jobs.export import export_result

    written = export_result(Path(given["run"]), [], step=given.get("step"))
    return [{"format": item.format, "path": str(item.path), "ok": item.ok} for item in written]


CHORES: dict[str, Chore] = {
    "check": check_photos,
    "try": try_changes,
    "unpack": unpack_zip,
    "inspect": inspect_base,
    "plan": plan_run,
    "verify": verify_lora,
    "convert": convert_lora,
    "merge": merge_loras,
    "export": export_step,
    "draw": draw_wish,
    "push": push_run,
}


class _Told:
    """A consumer of events that writes how far the work is."""

    def __init__(self) -> None:
        self.done, self.total, self.unit = 0, 0, ""

    def __call__(self, event: Event) -> None:
        if isinstance(event, PhaseStarted):
            self.done, self.total, self.unit = 0, event.total, event.unit
        elif isinstance(event, PhaseAdvanced):
            self.done += event.amount
            _tell({"progress": [self.done, self.total, self.unit or event.title]})


def _tell(value: Mapping[str, Any]) -> None:
    sys.__stdout__.write(json.dumps(value) + "\n")  # type: ignore[union-attr]
    sys.__stdout__.flush()  # type: ignore[union-attr]


def main() -> None:
    """Does one chore: its name is the argument, its values are JSON on the standard input."""
    from finetune.core.logging import quiet
    from finetune.ui.plain_words import without_places

    quiet()
    given = parse_json(sys.stdin.buffer.read().decode("utf-8"), "the chore", dict)
    sys.stdout = sys.stderr  # what a library prints is not for the page
    try:
        with sent_to(_Told()):
            result = CHORES[sys.argv[1]](given)
    except (BadInput, CheckFailed) as error:
        _tell({"error": without_places(str(error))})
    else:
        _tell({"result": result})


if __name__ == "__main__":
    main()
