"""Checkpoints of sharded weights: torch.distributed.checkpoint with its safetensors writer, a file for each process.

Keys are "<part>/<name>", such as "trained/denoiser.conv_in.weight" or "optimizer/0/exp_avg". A file holds rows of each
tensor, and its header says from which row on. What is no piece of a weight (a step counter, the scales of 8-bit
moments) has the number of its process behind the name: "optimizer/0/step@1".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.distributed.tensor import DTensor

from finetune.core.errors import BadInput
from finetune.core.fitting import ADVICE
from finetune.training.checkpoint import PARTS, State, state_of, stated
from finetune.training.pieces import Pieces


@dataclass(frozen=True)
class Layout:
    """How this process's tensors lie in the whole ones.

    `cut`: name -> trained parameter. `order`: their names as the optimiser numbers them.
    """

    cut: Mapping[str, DTensor]
    order: Sequence[str]
    rank: int
    world: int

    def weight(self, key: str) -> DTensor | None:
        """The trained parameter that the tensor of this key belongs to; None for none."""
        part, _, name = key.partition("/")
        if part == "optimizer":
            index = name.split("/", 1)[0]
            name = self.order[int(index)] if index.isdecimal() and int(index) < len(self.order) else ""
        return self.cut.get(name)

    def rows(self, count: int) -> tuple[int, int]:
        """This process's first row of `count`, and the one after its last: as torch.chunk cuts."""
        each = -(-count // self.world)
        first = min(self.rank * each, count)
        return first, min(first + each, count)


def write_shards(folder: Path, state: State, layout: Layout) -> None:
    """Writes this process's rows to `folder`. All processes call it.

    Raises:
        OSError: some process could not write; on all of them.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    tensors = dict(_placed(key, value, layout) for key, value in _keyed(state))
    try:
        save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise OSError(getattr(first, "errno", None) or 0, " ".join(str(first).split())[:200]) from error


def _keyed(state: State) -> Iterator[tuple[str, Tensor]]:
    for part in PARTS:
        for name, value in getattr(state, part).items():
            yield f"{part}/{name}", value


def _placed(key: str, value: Tensor, layout: Layout) -> tuple[str, Tensor]:
    """The key and the tensor as they are written: as a piece of a whole one, or as this process's own."""
    weight = layout.weight(key)
    if weight is None or value.ndim == 0 or value.shape != weight.to_local().shape:
        return f"{key}@{layout.rank}", value.detach().clone()  # bitsandbytes' tables are one tensor for all weights
    mesh, placements, shape = weight.device_mesh, weight.placements, weight.shape
    return key, DTensor.from_local(value.detach(), mesh, placements, shape=shape, stride=weight.stride())


def read_pieces(folder: Path, layout: Layout) -> State:
    """This process's rows of a checkpoint, which any number of processes wrote, or one alone.

    Raises:
        BadInput: its weights have other shapes.
    """
    state = stated(folder)
    files = Pieces(folder, state["files"])
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for key in files.mine(layout.rank if state.get("pieces") == layout.world else 0):
        plain, size = key.partition("@")[0], files.size(key)
        part, _, name = plain.partition("/")
        weight = layout.weight(plain)
        if weight is None or (part == "optimizer" and ("@" in key or tuple(size) != tuple(weight.shape))):
            parts[part][name] = files.read(key)
            continue
        if tuple(size) != tuple(weight.shape):
            here, there = ("x".join(map(str, shape)) for shape in (weight.shape, size))
            raise BadInput(
                f"the saved weights do not fit the recipe: {name!r} is {there} and should be {here}: {ADVICE}"
            )
        parts[part][name] = files.read(key, *layout.rows(size[0]))
    return state_of(state, parts)
