"""What the processes of a run agree on before they begin: recipe, inputs, versions, and the run folder.

The first process decides: the run folder, the order of the photos and the recipe of a run that goes on are its own.
The others compare what they have with that.
"""

from __future__ import annotations

import itertools
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.config.load import parse_run_recipe
from finetune.config.recipe import Recipe
from finetune.core.errors import BadInput
from finetune.data.samplers import Sample
from finetune.jobs.pins import in_order, inputs_of, with_photos
from finetune.jobs.prepare import Prepared
from finetune.runs.folder import RunFolder, next_folder, placeless_settings
from finetune.runs.inputs import SHOWN, RunInputs, changes, read_inputs
from finetune.training.peers import Peers, launch_store, together

_UNNAMED = itertools.count()  # runs of this process whose folder nobody named


def recipe_of(run: Path, peers: Peers) -> Recipe:
    """The recipe of the run in this folder of the first process; other machines need not have the folder.

    Raises:
        BadInput: this is not a run folder, or its recipe can't be read.
    """
    own = RunFolder(run).recipe if peers.rank == 0 else None
    values = peers.from_first(None if own is None else own.model_dump(mode="json"))
    return own or parse_run_recipe(values, str(run))


def recipe_to_resume(run: Path, photos: Path | None = None) -> Recipe:
    """`recipe_of` for the command line, with the place where this machine has the photos now.

    Raises:
        BadInput: as `recipe_of`; or the photos are not where they were.
    """
    with together() as peers:
        return with_photos(recipe_of(run, peers), run, photos)


class FolderChoice:
    """Chooses the run folder, on the first process: as given, else run.dir, else a new one in runs/.

    Workers that torchrun started again (--max-restarts) continue in the folder that the launch chose before.
    torchrun's agent keeps its name, and forgets it when it ends: a later launch takes a new folder.
    """

    def __init__(self, recipe: Recipe, given: Path | str | None, peers: Peers) -> None:
        self.recipe, self.named, self.peers = recipe, given or recipe.run.dir, peers
        self._key = "" if self.named else f"finetune/run-folder/{next(_UNNAMED)}"
        self._store = launch_store() if self._key and peers.rank == 0 else None

    def known(self) -> Path | None:
        """The folder, unless it is still to be chosen; the same on all processes."""
        known = str(self.named) if self.named else None
        if self._store is not None and self._store.check([self._key]):
            known = self._store.get(self._key).decode()
        known = self.peers.from_first(known)
        return None if known is None else Path(known)

    def chosen(self) -> Path:
        """The folder; the same on all processes.

        Raises:
            BadInput: another machine holds later checkpoints of the run than the first one.
        """
        known = self.known()
        if known is not None:
            self._refuse_later_elsewhere(known)
            return known
        path = self.peers.from_first(str(next_folder(self.recipe.run.name)))
        if self._store is not None:
            self._store.set(self._key, path)
        return Path(path)

    def _refuse_later_elsewhere(self, path: Path) -> None:
        told = self.peers.gather([RunFolder(path).checkpoints.newest_step(), platform.node()])
        first, machine = told[0]
        for rank, (step, host) in enumerate(told):
            if step > first:
                raise BadInput(
                    f"{path} has a checkpoint of step {step} on {host} (process {rank}) but of step {first} on "
                    f"{machine} (process 0), whose folder counts: make the machine of process {rank} the first "
                    "(node_rank 0), or copy its folder to that of process 0"
                )


def in_first_order(job: Prepared, run: Path, peers: Peers) -> Prepared:
    """The job with its photos in the order in which the run began, as the first process's folder has it.

    Raises:
        BadInput: that record is damaged.
    """
    recorded = read_inputs(run) if peers.rank == 0 else None
    order = peers.from_first(None if recorded is None else recorded.inputs.model_dump(mode="json"))
    return job if order is None else in_order(job, RunInputs.model_validate(order))


def refuse_other_inputs(job: Prepared, peers: Peers) -> None:
    """Compares each process's recipe, photos, captions, base and versions of packages with the first one's.

    Places may differ, as contents are compared: each machine may have its copy of photos and base.

    Raises:
        BadInput: some process has others; they are named, on all processes.
    """
    if peers.world == 1:
        return
    own = [placeless_settings(job.recipe), inputs_of(job).model_dump(mode="json")]
    first = peers.from_first(own)
    _refuse(_differences(first, own), peers)


def refuse_other_class_images(streams: Sequence[Sequence[Sample]], peers: Peers) -> None:
    """The same for the class images, which each machine has in its own folder, or has drawn itself.

    Raises:
        BadInput: they are not the same images.
    """
    if peers.world == 1 or len(streams) < 2:
        return
    own = [[sample.name, sample.crops[0].photo.digest] for stream in streams[1:] for sample in stream]
    first = peers.from_first(own)
    odd = [mine[0] for mine, other in itertools.zip_longest(own, first, fillvalue=["more", ""]) if mine != other]
    _refuse([f"{name} is not the same" for name in odd], peers)


def _differences(first: list[Any], own: list[Any]) -> list[str]:
    names = sorted(first[0].keys() | own[0].keys())
    keys = [
        f"{name} is {own[0].get(name)!r} and not {first[0].get(name)!r}"
        for name in names
        if first[0].get(name) != own[0].get(name)
    ]
    return keys + changes(RunInputs.model_validate(first[1]), RunInputs.model_validate(own[1]))


def _refuse(found: list[str], peers: Peers) -> None:
    told = peers.gather([found[: SHOWN + 1], platform.node()])
    for rank, (changed, host) in enumerate(told):
        if changed:
            shown = "; ".join(changed[:SHOWN]) + ("; and more" if len(changed) > SHOWN else "")
            raise BadInput(
                f"process {rank} on {host} is not as process 0 on {told[0][1]} was started ({shown}): give every "
                "machine the same recipe, photos, base and versions of packages"
            )
