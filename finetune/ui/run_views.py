"""What a page shows of a run, read from its folder: whoever started it."""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from finetune.core.errors import BadInput
from finetune.core.files import leads_out
from finetune.core.reading import numbers_in, read_json
from finetune.runs.at_work import is_at_work
from finetune.ui.plain_words import (
    MEASURE_TITLES,
    PLACES,
    VERDICTS_IN_WORDS,
    WITH_STRENGTH,
    advice_for_the_page,
    without_places,
)
from finetune.ui.started import NAME, Starter
from finetune.ui.thinning import GrowingMetrics
from finetune.verdicts.changed import said_of_pictures
from finetune.verdicts.rows import BROKEN, read_rows
from finetune.verdicts.rows import FILE as VERDICTS

FRESH = 20.0  # seconds: a status is written every second, but not while a base loads
OPEN_CURVES = 8
MOST_RUNS = 200
MOST_COLUMNS = 12  # of the strip
Reading = TypeVar("Reading")
IMAGE_FOLDER = re.compile(r"before|after|step-\d{1,9}")
IMAGE_FILE = re.compile(r"\d{1,4}-[\w-]{1,40}\.png")


class RunViews:
    """Reads the runs in a folder. The curves of the runs that were looked at last stay in memory, thinned."""

    def __init__(self, starter: Starter) -> None:
        self.starter = starter
        self._curves: OrderedDict[str, GrowingMetrics] = OrderedDict()
        self._measures: OrderedDict[str, VerdictCurves] = OrderedDict()

    def folder(self, name: str) -> Path:
        """The folder of a run.

        Raises:
            BadInput: there is no such run.
        """
        folder = self.starter.runs / name
        there = bool(NAME.fullmatch(name)) and folder.is_dir() and not leads_out(folder, self.starter.runs)
        if not there or not ((folder / "recipe.yaml").is_file() or self.starter.was_started(name)):
            raise BadInput(f"there is no run called {without_places(name)!r:.100} here: go back to the list")
        return folder

    def listed(self) -> list[dict[str, Any]]:
        """A short view of each run, the newest first."""
        runs = self.starter.runs
        found = [each for each in runs.iterdir() if NAME.fullmatch(each.name)] if runs.is_dir() else []
        kept = [each for each in found if (each / "recipe.yaml").is_file() or self.starter.was_started(each.name)]
        newest = sorted((each for each in kept if not leads_out(each, runs)), key=_changed, reverse=True)
        return [self.short(each.name) for each in newest[:MOST_RUNS]]

    def short(self, name: str) -> dict[str, Any]:
        """State, step and verdict of a run, and an image of it."""
        folder = self.folder(name)
        status = _status(folder)
        state = self.state(folder, status)
        keys = ("phase", "done", "total", "eta", "step", "steps", "loss", "verdict")
        return {"name": name, "state": state, "changed": _changed(folder), "cover": _cover(folder)} | {
            key: status.get(key) for key in keys
        }

    def state(self, folder: Path, status: dict[str, Any]) -> str:
        """One of starting, running, stopped, finished, failed and ended (without a word, as when it was killed)."""
        said = status.get("state")
        if self.starter.is_own_child(folder.name):
            return "running" if said == "running" else "starting"
        if said == "running":
            fresh = time.time() - numbers_in(status).get("time", 0.0) < FRESH
            return "running" if fresh or is_at_work(folder) else "ended"
        if said in ("finished", "stopped", "failed"):
            return str(said)
        return "running" if is_at_work(folder) else "failed"

    def live(self, name: str) -> dict[str, Any]:
        """All that changes while a run works. Each call reads a bounded part of its metrics."""
        folder = self.folder(name)
        metrics = self._metrics(name, folder)
        measures = _kept(self._measures, name, lambda: VerdictCurves(folder))
        more = metrics.update()
        curve = metrics.curve
        pace = curve.seconds / curve.steps if curve.steps else None
        log = self.starter.log(name)
        view = self.short(name) | {
            "curve": curve.rows(),
            "more": more,
            "seconds_per_step": pace,
            "verdicts": measures.update(),
            "verdict_words": VERDICTS_IN_WORDS.get(str(_status(folder).get("verdict")), ""),
            "images": _images(folder),
            "log": log,
            "exports": len(_listings(folder)),
            "report": (folder / "report.html").is_file(),
        }
        errors = [line for line in log if line.startswith("error: ")]
        view["error"] = errors[-1].removeprefix("error: ") if errors and view["state"] in ("failed", "ended") else ""
        return view

    def about(self, name: str) -> dict[str, Any]:
        """What stays the same: prompts, base, plan, recipe and command; and, at the end, verdict and files.

        Raises:
            BadInput: its record is damaged.
        """
        from finetune.runs.record import RunRecord, read_record

        folder = self.folder(name)
        record = read_record(folder / "run.json") if (folder / "run.json").is_file() else RunRecord()
        rows = {key: _text(value) for key, value in record.public_plan.items()}
        return {
            "name": name,
            "trigger": record.trigger if record.token or record.style or record.subjects else "",
            "is_style": record.is_style,
            "base": record.public_base if record.base else "",
            "family": record.family,
            "resolution": record.resolution,
            "photos": record.count,
            "prompts": record.prompts,
            "plan": rows,
            "command": self.starter.command(name),
            "recipe": _recipe(folder),
            "verdict": _verdict(folder),
            "files": _files(folder),
            "checkpoints": _checkpoints(folder),
            "has_strength": _method(folder) in WITH_STRENGTH,
            "has_card": (folder / "exports" / "README.md").is_file(),
        }

    def image(self, name: str, inside: str, file: str) -> Path:
        """A drawn image of a run.

        Raises:
            BadInput: there is none of that name.
        """
        folder = self.folder(name)
        path = folder / "samples" / inside / file
        if not IMAGE_FOLDER.fullmatch(inside) or not IMAGE_FILE.fullmatch(file) or not path.is_file():
            raise BadInput("there is no such image: load the page again")
        if leads_out(path, folder):
            raise BadInput(f"{file} is a link that leads out of the run: it is not shown")
        return path

    def export(self, name: str, path: str) -> Path:
        """A file or folder that the run has exported.

        Raises:
            BadInput: it has exported none of that name.
        """
        folder = self.folder(name)
        if path not in {item["path"] for item in _files(folder)} or not (folder / path).exists():
            raise BadInput("the run has no such file: load the page again")
        return folder / path

    def pace(self, base: str) -> float | None:
        """Seconds for one photo of a step, as the newest finished run with this base took; None without any."""
        for run in [each for each in self.listed() if each["state"] == "finished"][:10]:
            folder = self.folder(run["name"])
            used, batch = _base_and_batch(folder)
            metrics = self._metrics(run["name"], folder)
            if used == base and batch and (metrics.update() or metrics.curve.steps):
                return metrics.curve.seconds / metrics.curve.steps / batch
        return None

    def _metrics(self, name: str, folder: Path) -> GrowingMetrics:
        return _kept(self._curves, name, lambda: GrowingMetrics(folder / "metrics.jsonl"))


def _kept(held: OrderedDict[str, Reading], name: str, make: Callable[[], Reading]) -> Reading:
    """What is held of a run, made if it is not there; of the runs that were looked at last, `OPEN_CURVES` are held."""
    if name not in held:
        held[name] = make()
    held.move_to_end(name)
    while len(held) > OPEN_CURVES:
        held.popitem(last=False)
    return held[name]


class VerdictCurves:
    """The measures of a run, read again only when their file has changed: it gets a line in hundreds of steps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seen: tuple[int, int, int] | None = None
        self._curves: list[dict[str, Any]] = []

    def update(self) -> list[dict[str, Any]]:
        """Name, title and [step, value] pairs of each measure."""
        try:
            about = (self.folder / VERDICTS).stat()
        except FileNotFoundError:
            return []
        seen = about.st_ino, about.st_size, about.st_mtime_ns
        if seen != self._seen:
            self._curves, self._seen = verdict_curves(self.folder), seen
        return self._curves


def verdict_curves(folder: Path) -> list[dict[str, Any]]:
    """The measures over the steps: name, title and [step, value] pairs."""
    rows = read_rows(folder / VERDICTS)
    found = []
    for name, title in MEASURE_TITLES.items():
        points = [[row.step, row.values[name]] for row in rows if abs(row.values.get(name, BROKEN)) < BROKEN]
        found += [{"name": name, "title": title, "points": points}] if points else []
    return found


def _status(folder: Path) -> dict[str, Any]:
    file = folder / "status.json"
    try:
        return read_json(file, dict) if file.is_file() else {}
    except (BadInput, OSError):
        return {}


def _changed(folder: Path) -> float:
    """When the run was last heard of, in seconds since 1970."""
    files = [folder / "status.json", folder / "recipe.yaml", folder]
    return next(file.stat().st_mtime for file in files if file.exists())


def _images(folder: Path) -> list[dict[str, Any]]:
    """The folders of drawn images in the order of time, each with the names of its files by prompt."""
    home = folder / "samples"
    steps = sorted(each.name for each in home.glob("step-*") if IMAGE_FOLDER.fullmatch(each.name))
    if len(steps) > MOST_COLUMNS:
        steps = [steps[round(number * (len(steps) - 1) / (MOST_COLUMNS - 1))] for number in range(MOST_COLUMNS)]
    found = []
    for name in ("before", *steps, "after"):
        files = sorted(file.name for file in (home / name).glob("*.png") if IMAGE_FILE.fullmatch(file.name))
        step = int(name[5:]) if name.startswith("step-") else None
        found += [{"folder": name, "step": step, "files": files}] if files else []
    return found


def _cover(folder: Path) -> str:
    """The newest image of the first prompt: FOLDER/FILE; empty without any."""
    drawn = _images(folder)
    return f"{drawn[-1]['folder']}/{drawn[-1]['files'][0]}" if drawn else ""


def _text(value: Any) -> str:
    return without_places(", ".join(map(str, value)) if isinstance(value, list) else str(value))


def _base_and_batch(folder: Path) -> tuple[str, int]:
    """The base that a run's recipe names, and its batch size; ("", 0) where that can't be read."""
    from finetune.config.profiles import at
    from finetune.core.reading import parse_yaml, read_utf8

    try:
        values = parse_yaml(read_utf8(folder / "recipe.yaml"), "recipe.yaml")
    except (BadInput, OSError):
        return "", 0
    base, batch = at(values, "base.source", at(values, "base")), at(values, "run.batch_size")
    return str(base), batch if type(batch) is int else 0


def _method(folder: Path) -> str:
    """method.kind of a run's recipe; "" where it can't be read."""
    from finetune.config.profiles import at
    from finetune.core.reading import parse_yaml, read_utf8

    try:
        values = parse_yaml(read_utf8(folder / "recipe.yaml"), "recipe.yaml")
    except (BadInput, OSError):
        return ""
    return str(at(values, "method.kind", ""))


def _recipe(folder: Path) -> str:
    from finetune.core.reading import read_utf8

    file = folder / "recipe.yaml"
    return without_places(read_utf8(file)) if file.is_file() else ""


def _verdict(folder: Path) -> dict[str, Any]:
    """The verdict on a finished run; empty for another."""
    try:
        held = read_json(folder / "verdict.json", dict) if (folder / "verdict.json").is_file() else {}
    except BadInput:
        return {}
    said = {key: held.get(key) for key in ("word", "sentence", "step")}
    said["advice"] = advice_for_the_page(str(held.get("advice") or ""))
    return said | {"copies": " ".join(said_of_pictures(held)) or None} if held else {}


def _checkpoints(folder: Path) -> list[int]:
    names = (each.name for each in (folder / "checkpoints").glob("step-*"))
    return sorted(int(name[5:]) for name in names if name[5:].isdecimal())


def _listings(folder: Path) -> dict[int | None, Path]:
    """The lists of exported files: of the result (None), and of each step whose checkpoint was exported."""
    steps = [file for file in (folder / "exports").glob("step-*/exports.json") if file.parent.name[5:].isdecimal()]
    found: dict[int | None, Path] = {int(file.parent.name[5:]): file for file in sorted(steps)}
    return ({None: folder / "exports.json"} if (folder / "exports.json").is_file() else {}) | found


def _files(folder: Path) -> list[dict[str, Any]]:
    """The exported files: where each goes, and what its checks said; what most programs read comes first."""
    from finetune.core.records import checks_of
    from finetune.runs.exports import read_exports

    found = []
    for step, listing in _listings(folder).items():
        for item in read_exports(folder, listing):
            checks = [{"passed": check.passed, "line": without_places(check.line)} for check in checks_of(item)]
            own = {key: item[key] for key in ("format", "path", "size", "read_by")}
            more = {"limits": item.get("limits", []), "checks": checks, "places": PLACES.get(item["format"], {})}
            found.append(own | more | {"step": step})
    order = list(PLACES)
    return sorted(found, key=lambda each: order.index(each["format"]) if each["format"] in order else len(order))
