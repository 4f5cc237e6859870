"""What a person draws with a run: a prompt at some seeds, by one checkpoint or by two side by side. All is kept."""

from __future__ import annotations

import math
import re
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.core.errors import BadInput
from finetune.core.files import leads_out, replacing_folder, write_json
from finetune.core.reading import read_json

if TYPE_CHECKING:
    from finetune.families.base import Family
    from finetune.runs.record import RunRecord

RECORD = "drawing.json"
DRAWING = re.compile(r"\d{8}-\d{6}-[0-9a-f]{8}")
IMAGE = re.compile(r"[01]/00-\d{1,10}\.png")
LONGEST_PROMPT = 2_000  # characters
MOST_IMAGES, MOST_STEPS, LARGEST_SEED = 8, 150, 2**32
STRONGEST = 2.0
MOST_SHOWN = 30  # drawings of a run


@dataclass(frozen=True)
class Side:
    """What draws: a run's checkpoint (None: its result) at a strength, or its `base` alone."""

    run: str
    step: int | None = None
    weight: float = 1.0
    base: bool = False


@dataclass(frozen=True)
class PromptWish:
    """A prompt that one or two sides draw, at the seeds `seed`, `seed` + 1 and so on."""

    prompt: str
    sides: tuple[Side, ...]
    negative: str = ""
    seed: int = 0
    count: int = 4
    steps: int = 25
    guidance: float | None = None  # None: the run's own


def wish_of(values: Mapping[str, Any], known: Callable[[str], object]) -> PromptWish:
    """What a page asked for. `known` raises BadInput for a run that is not there.

    Raises:
        BadInput: a value can't be used.
    """
    prompt, negative = (" ".join(str(values.get(key, "")).split()) for key in ("prompt", "negative"))
    if not prompt or len(prompt) > LONGEST_PROMPT or len(negative) > LONGEST_PROMPT:
        raise BadInput(f"write a prompt of at most {LONGEST_PROMPT} characters: what the image should show")
    given = values.get("sides")
    if not isinstance(given, list) or not 1 <= len(given) <= 2 or not all(isinstance(each, dict) for each in given):
        raise BadInput("choose one checkpoint to draw with, or two to compare")
    sides = tuple(_side(each) for each in given)
    for side in sides:
        known(side.run)
    whole = {
        "seed": _within(values.get("seed", 0), 0, LARGEST_SEED, "the seed"),
        "count": _within(values.get("count", 4), 1, MOST_IMAGES, "the number of images"),
        "steps": _within(values.get("steps", 25), 1, MOST_STEPS, "the number of steps"),
    }
    guidance = values.get("guidance")
    return PromptWish(
        prompt, sides, negative, guidance=None if guidance is None else _number(guidance, 0, 50), **whole
    )


def _side(given: Mapping[str, Any]) -> Side:
    step = given.get("step")
    chosen = None if step is None else _within(step, 0, 10**9, "the step")
    weight = _number(given.get("weight", 1.0), 0, STRONGEST)
    return Side(str(given.get("run", "")), chosen, weight, bool(given.get("base")))


def _within(value: Any, least: int, most: int, called: str) -> int:
    if type(value) is not int or not least <= value <= most:
        raise BadInput(f"{called} is {value!r:.40}: give a whole number from {least} to {most}")
    return value


def _number(value: Any, least: float, most: float) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or not least <= value <= most:
        raise BadInput(f"{value!r:.40} can't be used here: give a number from {least:g} to {most:g}")
    return float(value)


class Drawings:
    """The drawings in FOLDER/drawn, each with what was asked for."""

    def __init__(self, own: Path) -> None:
        self.home = own / "drawn"

    def new(self) -> Path:
        """A folder for the next drawing, which is not there yet."""
        return self.home / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"

    def of(self, run: str) -> list[dict[str, Any]]:
        """The newest drawings in which a run took part."""
        folders = sorted(self.home.iterdir(), reverse=True) if self.home.is_dir() else []
        found: list[dict[str, Any]] = []
        for folder in folders:
            if len(found) == MOST_SHOWN:
                break
            held = self._read(folder)
            if held and any(side["run"] == run for side in held["sides"]):
                found.append({"name": folder.name, **held})
        return found

    def image(self, name: str, file: str) -> Path:
        """An image of a drawing.

        Raises:
            BadInput: there is none of that name.
        """
        path = self._folder(name) / file
        if not IMAGE.fullmatch(file) or not path.is_file() or leads_out(path, self.home):
            raise BadInput("there is no such image: load the page again")
        return path

    def remove(self, name: str) -> None:
        """Removes a drawing.

        Raises:
            BadInput: there is none of that name.
        """
        shutil.rmtree(self._folder(name))

    def _folder(self, name: str) -> Path:
        folder = self.home / name
        if not DRAWING.fullmatch(name) or not folder.is_dir() or leads_out(folder, self.home):
            raise BadInput("there is no such drawing: load the page again")
        return folder

    def _read(self, folder: Path) -> dict[str, Any]:
        try:
            return read_json(folder / RECORD, dict) if DRAWING.fullmatch(folder.name) else {}
        except (BadInput, OSError):
            return {}


def draw_wish(given: Mapping[str, Any]) -> Any:
    """The chore: draws a wish into the new folder `folder`. `runs` says where the runs lie."""
    from finetune.jobs.images import ImageRequest, draw_files
    from finetune.sampling.draw import check_sampling
    from finetune.sampling.settings import Sampling

    wish = PromptWish(**given["wish"] | {"sides": tuple(Side(**side) for side in given["wish"]["sides"])})
    notes: list[str] = []
    with replacing_folder(Path(given["folder"])) as temporary:
        for number, side in enumerate(wish.sides):
            family, info = _opened(Path(given["runs"]) / side.run, side)
            guidance = info.guidance if wish.guidance is None else wish.guidance
            size = info.resolution or family.resolution
            sampling = Sampling(wish.negative, "dpm++", wish.steps, guidance, size)
            check_sampling(family, sampling)
            prompts = _prompts(family, wish, info, notes)
            seeds = range(wish.seed, wish.seed + wish.count)
            request = ImageRequest(prompts[:1], seeds, sampling, info.base)
            draw_files(family, request, temporary / str(number), f"Drawing {number + 1} of {len(wish.sides)}")
            del family
        write_json(temporary / RECORD, asdict(wish) | {"notes": list(dict.fromkeys(notes))})
    return {"name": Path(given["folder"]).name}


def _opened(run: Path, side: Side) -> tuple[Family, RunRecord]:
    from finetune.core.devices import DTYPES, machine
    from finetune.jobs.open import open_result
    from finetune.runs.folder import RunFolder
    from finetune.training.accelerate import resolve_precision

    device, dtype = machine()
    if not side.base:
        return open_result(run, device=device, dtype=dtype, weight=side.weight, step=side.step)
    recipe = RunFolder(run).recipe
    family = recipe.base.load(DTYPES[resolve_precision(recipe.run)])
    family.parts.to(device)
    return family, RunFolder(run).info


def _prompts(family: Family, wish: PromptWish, info: RunRecord, notes: list[str]) -> list[str]:
    """The prompt with the run's words in it. What is cut from it, and what the base can't do, is told.

    Raises:
        BadInput: the base draws from an image.
    """
    from finetune.jobs.images import name_cut_prompts
    from finetune.jobs.words import filled_prompts

    if info.reads:
        raise BadInput(
            f"this base draws from {' and '.join(info.reads)}, which the page does not take yet: use `finetune sample`"
        )
    prompts = filled_prompts([wish.prompt], info)
    notes += name_cut_prompts(family, [*prompts[:1], wish.negative])
    return prompts
