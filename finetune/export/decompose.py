"""Low-rank approximation of weight changes by the truncated SVD, which is optimal (Eckart and Young, 1936)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from finetune.core.determinism import threads_at_most
from finetune.core.devices import doubled, exact_device
from finetune.core.errors import BadInput
from finetune.families.base import Family
from finetune.families.naming.clip import strip_text_model
from finetune.families.parts import Released

LAYERS = (torch.nn.Linear, torch.nn.Conv2d)  # what a LoRA file can hold


@dataclass(frozen=True)
class Kept:
    """How much of the deltas an approximation holds.

    `energy`: the share of the squared singular values. `error`: |approximation - delta| / |delta| over all modules.
    `worst`: the same for the worst module. `left_out`: a sentence about what a LoRA can't hold at all, or empty.
    """

    energy: float
    error: float
    worst: float
    worst_module: str
    left_out: str = ""


@dataclass(frozen=True)
class Decomposed:
    """The singular value decomposition of deltas.

    `factors`: part -> module -> (A, B) of each delta at the largest rank asked for, or at its full rank if that is
    smaller. Their first r rows and columns are the approximation of rank r. `spectra`: "part.module" -> all singular
    values.
    """

    factors: dict[str, dict[str, tuple[Tensor, Tensor]]]
    spectra: dict[str, Tensor]

    def layers(self, rank: int) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
        """The best approximation of every delta with this rank: part -> module -> (A, B)."""
        return {
            part: {module: (a[:rank], b[:, :rank]) for module, (a, b) in modules.items()}
            for part, modules in self.factors.items()
        }

    def kept(self, rank: int) -> Kept:
        return kept_energy({name: (s, rank) for name, s in self.spectra.items()})

    def rank_for(self, max_error: float) -> int:
        """The smallest rank whose relative error over all modules is at most `max_error` (0 to 1)."""
        energy = torch.zeros(max(len(s) for s in self.spectra.values()), dtype=torch.float64)
        for s in self.spectra.values():
            energy[: len(s)] += s.double().square()
        lost = energy.sum() - energy.cumsum(0)  # after rank 1, 2, ...
        return min(int((lost > max_error**2 * energy.sum()).sum()) + 1, len(energy))


@torch.no_grad()
def decompose(deltas: Iterable[tuple[str, str, Tensor]], most: int) -> Decomposed:
    """Decomposes (part, module, delta [out, in(,k,k)]) up to rank `most`. The results are on the CPU."""
    found = Decomposed({}, {})
    for part, module, change in deltas:
        u, s, v = _svd(change.flatten(1))
        r = min(most, len(s))
        root = s[:r].sqrt()
        a = (root[:, None] * v[:r]).reshape(r, *change.shape[1:])
        b = (u[:, :r] * root).reshape(-1, r, *[1] * (change.ndim - 2))
        found.factors.setdefault(part, {})[module] = (a.cpu(), b.cpu())
        found.spectra[f"{part}.{module}"] = s.cpu()
    return found


class Difference:
    """The difference between a tuned model and its base.

    A released part is loaded only while it is compared. For two `unloaded` families, only one part of each is in
    memory at a time.

    Raises:
        BadInput: the models belong to different families.
    """

    def __init__(self, base: Family, tuned: Family) -> None:
        if base.name != tuned.name:
            raise BadInput(
                f"the model is of family {tuned.name} but the base is of family {base.name}: give the base that the "
                "model was tuned from"
            )
        self.base, self.tuned = base, tuned
        self.beyond: dict[str, list[float]] = {}  # part -> squared changes of the tensors that a LoRA can't hold

    @torch.no_grad()
    def layers(self) -> Iterator[tuple[str, str, Tensor]]:
        """(part, module, tuned weight - base weight) of every linear layer and convolution that changed.

        Raises:
            BadInput: the models have different shapes.
        """
        adapted = self.base.trainable_parts()
        for part in [*adapted, *(name for name in self.base.parts if name not in adapted)]:
            yield from self._layers_of(part, part in adapted)

    def _layers_of(self, part: str, adapted: bool) -> Iterator[tuple[str, str, Tensor]]:
        """A function of its own: its local references would keep a part in memory while the next one is loaded."""
        with loaded_part(self.base, part) as old, loaded_part(self.tuned, part) as new:
            if adapted:
                yield from _moved_layers(part, old, new)
            self.beyond[part] = _moved_otherwise(old, new, adapted)

    @property
    def beyond_lora(self) -> tuple[int, float]:
        """The number of changed tensors that a LoRA can't hold (biases, norms, embeddings), and the norm of their
        change. Call it after `layers` is exhausted."""
        energies = [value for part in self.base.parts for value in self.beyond[part]]
        return len(energies), sum(energies) ** 0.5


def beyond(moved: Difference, found: Decomposed) -> tuple[str, float]:
    """A sentence about the changes that a LoRA can't hold, and their share of all changes; ("", 0) without any. Call
    it after `moved.layers` is exhausted."""
    count, change = moved.beyond_lora
    if not count:
        return "", 0.0
    held = sum(float(s.double().square().sum()) for s in found.spectra.values())
    share = change**2 / max(change**2 + held, 1e-30)
    line = f"{count} biases, norms and embeddings changed too ({share:.1%} of the change): a LoRA can't hold them"
    return line, share


def unloaded(kind: type[Family], folder: Path, dtype: torch.dtype, without: Sequence[str] = ()) -> Family:
    """A base whose parts are not in memory yet; `restore` and `loaded` read them."""
    family = kind.on_meta(folder, dtype, without)
    family.parts.release(list(family.parts))
    return family


def unloaded_base(family: Family, dtype: torch.dtype) -> Family:
    """The base from which `family` was loaded, with no parts in memory yet."""
    without = [part for part in family.sources if part not in family.parts]
    base = unloaded(type(family), family.folder, dtype, without)
    base.inputs, base.widened = family.inputs, family.widened
    return base


@contextmanager
def loaded_part(family: Family, part: str) -> Iterator[nn.Module]:
    """A part of the family. If it was released, it is in memory inside the block only."""
    absent = isinstance(family.parts[part], Released)
    family.parts.restore([part])
    try:
        yield family.parts[part]
    finally:
        if absent:
            family.parts.release([part])


def _moved_layers(part: str, old: nn.Module, new: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    others = {strip_text_model(path): child for path, child in new.named_modules()}
    for path, child in old.named_modules():
        if not isinstance(child, LAYERS):
            continue
        module = strip_text_model(path)
        change = _difference(part, module, child.weight, others.get(module))
        if bool(change.any()):
            yield part, module, change


def _moved_otherwise(old: nn.Module, new: nn.Module, adapted: bool) -> list[float]:
    """The squared change of each changed tensor that a LoRA can't hold."""
    layers = [path for path, child in old.named_modules() if isinstance(child, LAYERS)] if adapted else []
    held, energies = {f"{path}.weight" for path in layers}, []
    theirs = {strip_text_model(name): value for name, value in new.named_parameters()}
    for name, value in old.named_parameters():
        other = theirs[strip_text_model(name)]
        if name not in held and not torch.equal(other.float(), value.float().to(other.device)):
            change = doubled(other.float() - value.float().to(other.device))
            energies.append(float(change.square().sum()))
    return energies


def _difference(part: str, module: str, weight: Tensor, other: object) -> Tensor:
    theirs: Tensor | None = getattr(other, "weight", None)
    if theirs is None or theirs.shape != weight.shape:
        raise BadInput(
            f"{part} {module} has another shape in the model than in the base: give the base that the model was "
            "tuned from"
        )
    return theirs.float() - weight.float().to(theirs.device)


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The reduced SVD. Small matrices use one thread: on a busy machine, threads wait for each other (measured: 100
    times slower beside eight busy threads)."""
    matrix = matrix.to(exact_device(matrix.device))
    with threads_at_most(1) if min(matrix.shape) <= 512 else nullcontext():
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, v


def svd_of_product(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of B A from two small QR decompositions: U [out, r], S [r], V [r, in], in float64."""
    q, r = torch.linalg.qr(doubled(b))
    p, t = torch.linalg.qr(doubled(a).T)
    u, s, v = _svd(r @ t.T)
    return q @ u, s, v @ p.T


def rank_for_energy(s: Tensor, rank: int | None, energy: float | None) -> int:
    if rank is not None:
        return min(rank, len(s))
    share = s.square().cumsum(0) / s.square().sum().clamp(min=1e-30)
    return int((share < (energy or 1.0) - 1e-12).sum().clamp(max=len(s) - 1)) + 1


def factors_at_rank(u: Tensor, s: Tensor, v: Tensor, r: int, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of rank r in the shapes of the old ones; each gets the square root of the singular values."""
    root = s[:r].sqrt()
    return (root[:, None] * v[:r]).float().reshape(r, *a.shape[1:]), (u[:, :r] * root).float().reshape(
        len(b), r, *b.shape[2:]
    )


def kept_energy(spectra: dict[str, tuple[Tensor, int]]) -> Kept:
    whole = sum(float(s.square().sum()) for s, _ in spectra.values())
    lost = sum(float(s[r:].square().sum()) for s, r in spectra.values())
    errors = {
        name: (float(s[r:].square().sum()) / max(float(s.square().sum()), 1e-30)) ** 0.5
        for name, (s, r) in spectra.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    return Kept(1 - lost / max(whole, 1e-30), (lost / max(whole, 1e-30)) ** 0.5, errors[worst], worst)
