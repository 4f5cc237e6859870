"""The run folder: its recipe, records, metrics, checkpoints and results.

RUN/recipe.yaml            the resolved recipe          RUN/samples/    before, after, step-000100
RUN/run.json               facts about the run          RUN/exports/    files for other programs
RUN/metrics.jsonl          one line for each step       RUN/report.html the report
RUN/verdicts.jsonl         what was measured            RUN/verdict.json the verdict at the end
RUN/checkpoints/step-000250/{trained,optimizer,ema}.safetensors + state.json
"""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from finetune.config.load import SCHEMA, SCHEMA_LINE, dump_recipe, read_recipe
from finetune.config.recipe import Recipe
from finetune.core.errors import BadInput
from finetune.core.files import find_link_out, load_tensors, save_tensors, sha256, sweep, write_json, write_text
from finetune.core.reading import read_json
from finetune.runs.at_work import is_at_work
from finetune.runs.exports import read_exports
from finetune.runs.inputs import FILE as INPUTS
from finetune.runs.record import RunRecord, read_record, write_record
from finetune.training.checkpoint import Checkpoints

HOLDER = (
    "run.lock.txt"  # names the process that holds run.lock: Windows lets no other process read the lock file itself
)

LOCKS = ("run.lock", HOLDER)

# what a run writes, in its folder
FOLDERS = ("adapter", "attention", "checkpoints", "exports", "photos", "samples", "samples/before", "samples/after")
FILES = (
    *("timestep_loss.json", "adherence.json"),
    *("run.json", "inputs.json", "status.json", "metrics.jsonl", "exports.json", "report.html", "run.lock", HOLDER),
    *("verdicts.jsonl", "verdict.json"),
    *("adapter/trained.safetensors", "adapter/manifest.json"),
)
ORIGINS = "profile."  # where a recipe's values come from, which changes none of them
LONGEST_TOLD = 60  # characters of a setting in a message
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class RunFolder:
    """A run's folder. Only the main process writes to it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def checkpoints(self) -> Checkpoints:
        """The checkpoints in this folder."""
        return Checkpoints(self.path)

    @property
    def recipe(self) -> Recipe:
        """The run's recipe.

        Raises:
            BadInput: this is not a run folder, or its recipe can't be read.
        """
        file = self.path / "recipe.yaml"
        if not file.is_file():
            raise BadInput(f"{self.path} is not a run folder (it has no recipe.yaml): give the folder of a run")
        return read_recipe(file)

    @property
    def info(self) -> RunRecord:
        """The record in run.json: token, class noun, base hash, plan and more; an empty record if there is no file.

        Raises:
            BadInput: it is damaged, or a later version wrote it.
        """
        file = self.path / "run.json"
        return read_record(file) if file.is_file() else RunRecord()

    def write_info(self, info: RunRecord) -> None:
        """Writes run.json."""
        write_record(self.path / "run.json", info)

    def finished(self, steps: int) -> bool:
        """Returns whether the folder holds weights trained for exactly `steps` steps. If not, training goes on."""
        return self._result_fault() is None and self._result_steps() == str(steps)

    @property
    def has_result(self) -> bool:
        return self._trained.is_file()

    def _result_steps(self) -> str | None:
        from safetensors import safe_open

        with safe_open(self._trained, "pt") as held:
            return (held.metadata() or {}).get("steps")

    def step_to_open(self, step: int | None) -> int | None:
        """Which checkpoint's weights are meant by `--step`; None: the result's.

        Without a step: the result, or the newest checkpoint of a run that has not finished. A result that is damaged
        is left for `result` to tell.
        """
        result, last = self._trained.is_file(), self.recipe.run.steps
        if step is not None:
            return None if step == last and self.finished(last) else self.checkpoints.check_step(step)
        if result and (self._result_fault() is not None or self._result_steps() in (None, str(last))):
            return None
        if not result:
            return self.checkpoints.check_step(None)
        kept = self.checkpoints.steps()  # a run that was made longer
        return kept[-1] if kept and kept[-1] > int(self._result_steps() or 0) else None

    @property
    def can_be_longer(self) -> bool:
        """Whether more steps can follow: a schedule of the learning rate has come to its end."""
        return not (self.path / "recipe.yaml").is_file() or _curve(self.recipe)["optim.schedule_steps"] is None

    def at_work(self) -> bool:
        """Whether a process trains here now; one that ended, however it ended, does not."""
        return is_at_work(self.path)

    def refuse_work(self) -> None:
        """Raises:
        BadInput: a process trains here: the folder is its alone to write to. Or something odd is there.
        """
        self.refuse_odd()
        if self.at_work():
            raise BadInput(
                f"{self.path} is at work, and is only read until it ends: write somewhere else with --out PATH"
            )

    @contextmanager
    def held(self, recipe: Recipe) -> Iterator[None]:
        """Creates the folder, or uses an existing one of the same recipe, and locks it inside the block.

        A run that was begun keeps its own recipe until `write_recipe`: its inputs may still be refused.
        The operating system releases the lock when the process ends, even if it is killed.

        Raises:
            BadInput: as `check`; or the folder can't be created; or another process uses it.
        """
        self.check(recipe)  # leaves no lock behind in a folder that is not ours
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(
                f"the folder {self.path} could not be created ({error.strerror}): choose another with run.dir=PATH"
            ) from error
        with self._lock():
            self.check(recipe)  # again: until the lock was taken, another run could begin here
            name = f"process {os.getpid()} on {platform.node()}\n"
            write_text(self.path / HOLDER, name)
            sweep(self.path)
            if not (self.path / "recipe.yaml").is_file():
                self.write_recipe(recipe)
            yield

    def write_recipe(self, recipe: Recipe) -> None:
        write_text(self.path / "recipe.yaml", f"{SCHEMA_LINE}{SCHEMA}\n{dump_recipe(recipe)}")

    def _lock(self) -> AbstractContextManager[object]:
        lock = FileLock(self.path / "run.lock", fallback_to_soft=False, preserve_lock_file=True)
        try:
            return lock.acquire(blocking=False)
        except Timeout as error:
            holder = self.path / HOLDER
            name = holder.read_text(encoding="utf-8").strip() if holder.is_file() else ""
            raise BadInput(
                f"{self.path} is in use by {name or 'another process'}: wait for it, or choose another folder with "
                "run.dir=PATH"
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            raise BadInput(
                f"{self.path} is on a filesystem without file locks ({error.strerror}): choose a folder on another "
                "one with run.dir=PATH"
            ) from error

    def check(self, recipe: Recipe) -> None:
        """Checks that this recipe may run in this folder.

        Raises:
            BadInput: the folder holds something else, a run of another recipe (the message names the changed keys),
                a run of a later version, or a link that leads out of it.
        """
        file = self.path / "recipe.yaml"
        self.refuse_links()
        if file.is_file():
            self.refuse_odd()
            read_exports(self.path)
            self.info  # noqa: B018 - refuses a later version's run before it overwrites anything
            pinned = (self.path / INPUTS).is_file()  # by content, so that their places may change
            both = [_placeless(one) if pinned else one for one in (self.recipe, recipe)]
            changed = _changed_keys(*both)
            if changed:
                told = ", ".join(_told(both[0], name) for name in changed)
                raise BadInput(
                    f"{self.path} holds a run with another recipe (changed: {told}): {_advice(both[0], changed)}"
                )
        elif self.path.is_file() or (self.path.is_dir() and any(x.name not in LOCKS for x in self.path.iterdir())):
            raise BadInput(f"{self.path} exists and is not a run folder: choose another with run.dir=PATH")

    def refuse_odd(self) -> None:
        """Refuses a file where a run keeps a folder, and the reverse, before hours of work meet it.

        Raises:
            BadInput: there is such a thing.
        """
        for names, wrong, kinds in ((FOLDERS, Path.is_file, "a file"), (FILES, Path.is_dir, "a folder")):
            odd = next((self.path / name for name in names if wrong(self.path / name)), None)
            if odd is not None:
                other = "a folder" if kinds == "a file" else "a file"
                raise BadInput(f"{odd} is {kinds}, where a run keeps {other}: move it away")

    def check_place(self) -> None:
        """
        Raises:
            BadInput: the folder is not there, and can't be made.
        """
        there = next(place for place in (self.path, *self.path.absolute().parents) if place.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            reason = "not a folder" if not there.is_dir() else "not yours to write to"
            raise BadInput(
                f"the folder {self.path} could not be created ({there} is {reason}): choose another with run.dir=PATH"
            )

    def refuse_links(self) -> None:
        """Refuses links out of the folder: in a folder from somebody else, they could expose or overwrite other files.

        Raises:
            BadInput: there is such a link.
        """
        link = find_link_out(self.path)
        if link is not None:
            raise BadInput(
                f"{link} is a link that leads out of {self.path}: replace it with the file itself, or remove it"
            )

    def save_result(self, trained: dict[str, Tensor], metadata: dict[str, str]) -> None:
        """Writes RUN/adapter/trained.safetensors, and a manifest with its hash."""
        self._manifest.unlink(missing_ok=True)  # a kill in between leaves a result without one, which is made again
        save_tensors(self._trained, trained, metadata)
        write_json(self._manifest, {self._trained.name: sha256(self._trained)})

    def result(self) -> dict[str, Tensor]:
        """Returns the trained weights, as CPU tensors by their names.

        Raises:
            BadInput: the run has not finished, or the file is damaged.
        """
        if not self._trained.is_file():
            raise BadInput(f"{self.path} has not finished training: run `finetune resume {self.path}` first")
        fault = self._result_fault()
        if fault is not None:
            raise BadInput(
                f"{self._trained} {fault}: run `finetune resume {self.path}`, which makes it again from the last "
                "checkpoint"
            )
        return load_tensors(self._trained)

    @property
    def _trained(self) -> Path:
        return self.path / "adapter" / "trained.safetensors"

    @property
    def _manifest(self) -> Path:
        return self.path / "adapter" / "manifest.json"

    def _result_fault(self) -> str | None:
        """What is wrong with the trained weights; None for nothing. Runs without inputs.json are of a version that
        wrote no manifest: of theirs only the format is checked."""
        from safetensors import SafetensorError, safe_open

        if not self._trained.is_file():
            return "is not there"
        if self._manifest.is_file() or (self.path / INPUTS).is_file():
            return self._hash_fault()
        try:
            with safe_open(self._trained, "pt"):
                return None
        except (SafetensorError, OSError) as error:
            return f"is damaged ({error})"

    def _hash_fault(self) -> str | None:
        try:
            wanted = read_json(self._manifest, dict).get(self._trained.name) if self._manifest.is_file() else None
        except BadInput:
            wanted = None
        if wanted is None:
            return "has no hash beside it (manifest.json)"
        return None if wanted == sha256(self._trained) else "is not what was written (its hash is another)"


def is_run(path: Path) -> bool:
    """Whether `path` is a run's folder."""
    return (path / "recipe.yaml").is_file()


def next_folder(name: str, parent: Path = Path("runs")) -> Path:
    """Returns <parent>/<name>, or the first <parent>/<name>-<n> (n from 2) that does not exist. Creates nothing."""
    candidate, number = parent / name, 2
    while candidate.exists():
        candidate, number = parent / f"{name}-{number}", number + 1
    return candidate


def _changed_keys(old: Recipe, new: Recipe) -> list[str]:
    """The keys that differ, except those that a run may change: more steps, more processes, its folder's name."""
    before, after = (_flat(one.model_dump(mode="json")) | _curve(one) for one in (old, new))
    free = {"run.dir", "run.name", "run.keep", "run.checkpoint_every", "run.processes", "run.shard"}
    free |= {"run.keep_best", "run.verdicts", "run.verdicts_every"}  # what is measured changes nothing
    if after.get("run.steps", 0) >= before.get("run.steps", 0):
        free.add("run.steps")
    names = sorted(name for name in before.keys() | after.keys() if not name.startswith(ORIGINS))
    return [name for name in names if name not in free and before.get(name) != after.get(name)]


def _told(old: Recipe, name: str) -> str:
    """A changed key, with what the run has if that is short: a default may have changed, and not the user's recipe."""
    value = _flat(old.model_dump(mode="json")).get(name)
    short = isinstance(value, str | int | float) and len(str(value)) <= LONGEST_TOLD
    return f"{name}, which was {str(value).lower() if isinstance(value, bool) else value}" if short else name


def _curve(recipe: Recipe) -> dict[str, Any]:
    """What the learning rate's curve spans: not said is as good as run.steps."""
    shaped = recipe.optim.schedule != "constant" or recipe.method.has_windows
    return {"optim.schedule_steps": (recipe.optim.schedule_steps or recipe.run.steps) if shaped else None}


def _advice(old: Recipe, changed: list[str]) -> str:
    if changed == ["run.steps"]:
        return (
            f"a run can only become longer: give at least {old.run.steps}, or choose another folder with run.dir=PATH"
        )
    if changed != ["optim.schedule_steps"]:
        return "undo the change, or choose another folder with run.dir=PATH"
    span = _curve(old)["optim.schedule_steps"]
    return (
        f"another optim.schedule_steps, which is run.steps if left out, bends the learning rate's curve in the "
        f"middle; keep it with optim.schedule_steps={span} (a schedule's rate after its end is that of its end, "
        "0 under cosine and linear), or choose another folder with run.dir=PATH"
    )


def _placeless(recipe: Recipe) -> Recipe:
    """Without the folders of photos and class images, without the base's and the files to draw from: a run that
    records what is in them is compared by that."""
    nowhere = Path("pinned")
    subjects = [subject.model_copy(update={"photos": nowhere}) for subject in recipe.data.subjects]
    data = recipe.data.model_copy(update={"photos": nowhere, "subjects": subjects})
    base = recipe.base.model_copy(update={"source": "pinned", "like": None, "revision": None})
    sample = recipe.sample.model_copy(update=dict.fromkeys(recipe.sample.files, nowhere))
    return recipe.model_copy(update={"data": data, "base": base, "sample": sample})


def placeless_settings(recipe: Recipe) -> dict[str, Any]:
    """The recipe as "section.key" -> value, without what may differ from machine to machine: places and the launch."""
    flat = _flat(_placeless(recipe).model_dump(mode="json"))
    free = ("run.dir", "run.processes")
    return {name: value for name, value in flat.items() if name not in free and not name.startswith(ORIGINS)}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
