"""One state for all processes of a run: the first one reads the checkpoint and sends it to the others."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from finetune.core.errors import BadInput
from finetune.training.checkpoint import State
from finetune.training.peers import joined

PARTS = ("trained", "optimizer", "ema")


def shared_state(read: Callable[[], State | None], device: torch.device) -> State | None:
    """Returns the first process's state on all of them, bit for bit. Only there `read` is called.

    A run has no other state: every random number follows from (seed, step, sample), see `finetune.core.rng`.

    Args:
        read: returns the newest checkpoint, or None.
        device: of the processes' group, for the transfer.
    """
    peers = joined()
    if peers.world == 1:
        return read()
    state = read() if peers.rank == 0 else None
    outline = peers.from_first(None if state is None else _outline(state))
    if outline is None:
        return None
    parts = {part: _sent(outline[part], getattr(state, part, None), device) for part in PARTS}
    return state or State(outline["step"], **parts, values=outline["values"], pieces=outline["pieces"])


def refuse_other_states(made: Callable[[], State]) -> None:
    """Compares step, weights, optimiser state and averages with the first process's.

    Raises:
        BadInput: some process has another state; on all of them.
    """
    peers = joined()
    if peers.world == 1:
        return
    state = made()
    told = peers.gather([state.step, fingerprint(state), platform.node()])
    for rank, (step, digest, host) in enumerate(told):
        if [step, digest] != told[0][:2]:
            raise BadInput(
                f"process {rank} on {host} would go on after step {step} with other weights or another optimiser "
                f"state than process 0 on {told[0][2]} (step {told[0][0]}): start all machines with the same versions "
                "of packages and the same base"
            )


def fingerprint(state: State) -> str:
    """SHA-256 over the step, the values, and the names, dtypes, shapes and bits of all tensors."""
    digest = hashlib.sha256(json.dumps([state.step, state.values], sort_keys=True).encode())
    for part in PARTS:
        tensors: Mapping[str, Tensor] = getattr(state, part)
        for name in sorted(tensors):
            value = tensors[name]
            digest.update(f"{part}:{name}:{value.dtype}:{tuple(value.shape)}:".encode())
            digest.update(_bytes(value).numpy().data)
    return digest.hexdigest()


def _outline(state: State) -> dict[str, object]:
    """What JSON can hold of a state: everything but the bits of its tensors."""
    shapes = {
        part: [[name, str(value.dtype), list(value.shape)] for name, value in getattr(state, part).items()]
        for part in PARTS
    }
    return {"step": state.step, "values": state.values, "pieces": state.pieces, **shapes}


def _sent(
    outline: list[tuple[str, str, list[int]]], own: Mapping[str, Tensor] | None, device: torch.device
) -> dict[str, Tensor]:
    from torch.distributed import broadcast

    sent = {}
    for name, kind, shape in outline:
        dtype = getattr(torch, kind.removeprefix("torch."))
        value = torch.empty(shape, dtype=dtype) if own is None else own[name]
        moved = _bytes(value).to(device)
        if moved.numel():
            broadcast(moved, 0)
        sent[name] = moved.cpu().view(dtype).reshape(shape)
    return sent


def _bytes(value: Tensor) -> Tensor:
    """The bits of a tensor, as uint8 [n], on the CPU."""
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
