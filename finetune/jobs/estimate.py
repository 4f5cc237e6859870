"""Estimates what a run trains, writes and needs in memory, on the meta device: without weights or computation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from finetune.config.load import settled
from finetune.config.recipe import Recipe
from finetune.core.batch import Geometry
from finetune.core.devices import DTYPES, best_device, gib
from finetune.core.errors import BadInput
from finetune.export.registry import adapter_exports, embedding_exports, formats_for, model_exports, native_exports
from finetune.export.settings import UNCHECKED
from finetune.families.base import Family
from finetune.families.registry import family_of
from finetune.families.source import resolve_base
from finetune.families.toy import expectation
from finetune.jobs.planned_verdicts import planned_verdicts
from finetune.jobs.precision import base_dtype, set_precision
from finetune.runs.plan import verdict_rows
from finetune.training.accelerate import resolve_precision
from finetune.training.blocks import block_weights
from finetune.training.fast import is_worthwhile, most_bytes
from finetune.training.rounding import scratch_bytes

SHOWN = 4  # numbers of processes


@dataclass(frozen=True)
class Estimate:
    """What a run trains, and the memory that one training step needs, in bytes.

    Numbers: `parameters` of each part of the base, `trained_parameters`, adapted `modules`, and `vectors` (embeddings
    of new words). Bytes: `held` are frozen weights that stay in memory; `trained` are the trained weights with their
    gradients and optimiser state; `activations` are those of one micro-batch; `clean` is a whole unchanged base in the
    run's precision. `kernels` come on top on this machine's CPU: frozen weights in the form that `run.fast` makes.

    For `run.shard` (bytes): `cut` of `held` and `trained` are shared out among the processes; a process has `gathered`
    in one piece at a time. `processes` share the activations that are given.
    """

    parameters: dict[str, int]
    trained_parameters: int
    modules: int
    vectors: int
    clean: float
    held: float
    trained: float
    activations: float
    cut: float = 0.0
    gathered: float = 0.0
    processes: int = 1
    kernels: float = 0.0

    @property
    def total(self) -> float:
        """The bytes that a training step needs."""
        return self.held + self.trained + self.activations

    def of_each(self, processes: int) -> float:
        """The bytes that a step needs on each of so many processes with `run.shard`, of the same whole batch."""
        whole = self.held + self.trained - self.cut + self.gathered
        return whole + self.cut / processes + self.activations * self.processes / processes


def estimate(recipe: Recipe, checkpointing: bool | None = None) -> Estimate:
    """Estimates the run of a recipe at the real size of its base.

    `checkpointing` replaces `run.gradient_checkpointing`; None keeps it.

    Raises:
        BadInput: the base's configs are missing, the method does not fit the family, or the base can't run on the meta
            device.
    """
    recipe = settled(recipe, download=True)
    base, method = recipe.base, recipe.method
    folder = resolve_base(base.source, base.revision, base.like, weights=False)
    family = family_of(folder).on_meta(folder, base_dtype(recipe), base.without)
    set_precision(family, recipe)
    counts = {part: sum(p.numel() for p in module.parameters()) for part, module in family.parts.items()}
    clean = sum(_frozen_bytes(module) for module in family.parts.values())
    method.add_subject_token(family, recipe.data.token, recipe.data.class_noun)
    trained = method.attach(family, recipe.run.seed)
    modules, vectors = method.adapted_modules(family), method.new_vectors(family)
    count = sum(parameter.numel() for parameter in trained.values())
    busy = ["denoiser", *[part for part in method.part_names(family) if part != "denoiser"]]
    if len(busy) > 1:  # an encoder trains: prompts are not cached, so every encoder stays in memory
        busy = ["denoiser", *family.text_encoders]
    if recipe.run.gradient_checkpointing if checkpointing is None else checkpointing:
        family.enable_gradient_checkpointing(method.part_names(family))
    held = sum(_frozen_bytes(family.parts[part]) for part in busy)
    each, copied = 2 * recipe.run.weight_bytes + recipe.optim.state_bytes + 4 * bool(recipe.run.ema), 0
    if family.autocast is not None:  # autocast computes with a copy of the weights
        copied = 2 * count
        for part in family.parts.values():
            part.to(family.autocast)
    if recipe.prior.keeps_base:
        held += method.reference_bytes(family)
    activations = _activations(family, method.part_names(family), _samples(recipe), _side(recipe, family))
    if recipe.run.weights == "bf16":  # an update needs memory of its own, when the activations are gone
        activations = max(activations, scratch_bytes(parameter.numel() for parameter in trained.values()))
    return Estimate(
        parameters=counts,
        trained_parameters=count,
        modules=modules,
        vectors=vectors,
        clean=clean,
        held=held,
        trained=count * each + copied,
        activations=activations,
        cut=count * each + sum(_frozen_bytes(family.parts[part]) for part in method.part_names(family)),
        gathered=max(_gathered(family.parts[part]) for part in method.part_names(family)),
        processes=recipe.run.processes or 1,
        kernels=_kernels(recipe, family, busy),
    )


def _kernels(recipe: Recipe, family: Family, busy: Sequence[str]) -> float:
    """The bytes of what `run.fast` makes of the frozen weights of the parts in the loop, on this machine."""
    device = best_device()
    wanted = not recipe.run.shard and is_worthwhile(recipe.run.fast, device, family.parts["denoiser"])
    parts = [family.parts[part] for part in busy]
    return most_bytes(parts, recipe.run.processes or 1) if wanted and device.type == "cpu" else 0


def _gathered(part: nn.Module) -> float:
    """The bytes of a cut part that are in one piece while it computes: what is in no block, two blocks' weights (one
    computes, the next one is fetched), and one block's gradients."""
    blocks = block_weights(part)
    sizes = sorted((sum(p.numel() * p.element_size() for p in block) for block in blocks[:-1]), reverse=True)
    gradients = (sum(p.numel() * 4 for p in block if p.requires_grad) for block in blocks)
    return sum(p.numel() * p.element_size() for p in blocks[-1]) + sum(sizes[:2]) + max(gradients)


def report(recipe: Recipe) -> dict[str, str]:
    """Returns the estimate as rows (label -> text), with the memory both with and without gradient checkpointing.

    Raises:
        BadInput: as `estimate`.
    """
    recipe = settled(recipe, download=True)
    plain, light = estimate(recipe, checkpointing=False), estimate(recipe, checkpointing=True)
    own = light if recipe.run.gradient_checkpointing else plain
    folder = resolve_base(recipe.base.source, recipe.base.revision, recipe.base.like, weights=False)
    family = family_of(folder)
    whole = sum(own.parameters.values())
    written = own.trained_parameters if recipe.method.is_adapter else whole
    size = {"fp32": 4, "fp16": 2, "bf16": 2}[recipe.export.dtype]
    share = own.trained_parameters / whole
    moments = max(8, recipe.optim.state_bytes)
    kept = recipe.run.weight_bytes + moments + 4 * bool(recipe.run.ema)  # bytes of one parameter in a checkpoint
    expected = expectation(recipe.base.source, [subject.class_noun for subject in recipe.data.all_subjects])
    return {
        "base": f"{recipe.base.source} ({family.name}), {_side(recipe, family)} pixels",
        **({"expect": expected} if expected else {}),
        "parameters": ", ".join(f"{part} {_millions(count)}" for part, count in own.parameters.items()),
        "precision": _precision(recipe),
        "method": f"{recipe.method.kind} on {_trained_things(own)}",
        "trained": f"{own.trained_parameters:,} parameters ({share:.2%} of all)",
        "export": f"{_size(written * size)} in {recipe.export.dtype}",
        "checkpoint": f"{_size(own.trained_parameters * kept)}, of which {recipe.run.keep} are kept"
        f"{', and the best' if recipe.run.keep_best else ''}",
        "memory": f"{gib(own.total)}: frozen weights {gib(own.held)}, trained weights with gradients and moments "
        f"{gib(own.trained)}, activations of {_samples(recipe)} sample(s) {gib(own.activations)}",
        **({"on a CPU": f"up to {gib(own.kernels)} more, for faster steps (run.fast)"} if own.kernels else {}),
        "checkpointing": f"{gib(plain.total)} without run.gradient_checkpointing, {gib(light.total)} with it",
        **({"sharded": _sharded(recipe, own)} if recipe.run.shard else {}),
        "checks": _checks(recipe, own, family),
        **({"defaults": recipe.defaults} if recipe.defaults else {}),
        **verdict_rows(planned_verdicts(recipe), None, names=False),
        "not counted": "drawing images, the CUDA context (about 0.5 GiB) and fragmentation",
    }


def _sharded(recipe: Recipe, own: Estimate) -> str:
    """What each process needs, for the numbers of processes among which the batch can be split."""
    run = recipe.run
    photos = run.batch_size // run.accumulate
    counts = [run.processes] if run.processes else [count for count in range(2, photos + 1) if photos % count == 0]
    if not counts or counts == [1]:
        return "one process has nobody to share with: raise run.batch_size, and start several processes"
    listed = ", ".join(f"{gib(own.of_each(count))} on each of {count} processes" for count in counts[:SHOWN])
    return f"{listed}; {gib(own.gathered)} of it are blocks in one piece while they compute"


def _checks(recipe: Recipe, own: Estimate, family: type[Family]) -> str:
    """What checking the exports needs in memory."""
    if recipe.export.verify == "off":
        return f"{UNCHECKED} (export.verify is off)"
    formats = recipe.export.formats or formats_for(recipe.method.artifacts, usual=True)
    stored = {part: count * DTYPES[recipe.export.dtype].itemsize for part, count in own.parameters.items()}
    lines = [item.checking(stored, recipe.export.verify) for item in model_exports(formats)]
    loaded = [line for line in lines if line]
    words = [item for item in embedding_exports(formats) if "diffusers" in item.readers(family.name)]
    if recipe.export.verify == "full" and (words or adapter_exports(formats) or native_exports(formats)):
        loaded.append(f"an unchanged base of {gib(own.clean)}, with no other model in memory")
    return "; ".join(loaded) or "files are read back; no second model is loaded"


def _precision(recipe: Recipe) -> str:
    chosen = resolve_precision(recipe.run)
    if recipe.run.weights == "bf16":
        return f"{chosen}, with the trained weights in bf16 too (stochastic rounding)"
    if recipe.run.precision == "auto" and not torch.cuda.is_available():
        return f"{chosen}, because this machine has no GPU; set run.precision=bf16 to estimate for one"
    return chosen


def _side(recipe: Recipe, family: Family | type[Family]) -> int:
    """The training resolution in pixels. Accepts a loaded family or its class."""
    if recipe.data.resolution:
        return recipe.data.resolution
    folder = resolve_base(recipe.base.source, recipe.base.revision, recipe.base.like, weights=False)
    return family.resolution_of(folder)


def _samples(recipe: Recipe) -> int:
    """The predictions with a gradient in one micro-batch: photos, class images or class prompts, and everything
    else."""
    run, prior = recipe.run, recipe.prior
    photos = max(1, run.batch_size // (run.accumulate * (run.processes or 1)))
    own = photos * prior.predictions if prior.class_images is None else photos + photos * prior.class_images.share
    return math.ceil(own) + (math.ceil(photos * prior.others.share) if prior.others else 0)


def _trained_things(own: Estimate) -> str:
    counts = {"module": own.modules, "new embedding": own.vectors}
    return " and ".join(f"{count} {name}{'s' * (count > 1)}" for name, count in counts.items() if count)


def _frozen_bytes(module: nn.Module) -> float:
    return sum(p.numel() * p.element_size() for p in module.parameters() if not p.requires_grad)


def _activations(family: Family, parts: list[str], samples: int, side: int) -> float:
    """The bytes that autograd keeps from one forward pass for the backward pass. Weights do not count."""
    for part in parts:
        family.parts[part].train()
    latent = side // family.codec.factor
    noisy = torch.zeros(samples, family.codec.channels, latent, latent, device="meta")
    timesteps = torch.zeros(samples, dtype=torch.long, device="meta")
    square = [Geometry((side, side), (0, 0), (side, side))] * samples
    weights = [p for part in family.parts.values() for p in part.parameters()]
    with _counting(weights) as seen:
        cond = family.encode_prompts([""] * samples)
        try:
            prediction = family.predict(noisy, timesteps, cond, square)
        except NotImplementedError as error:
            raise BadInput(f"{family.name} can't be counted on the meta device ({error}): use --dry-run") from error
        prediction.float().square().mean()
    return float(sum(seen.values()))


@contextmanager
def _counting(weights: list[nn.Parameter], fused: bool = True) -> Iterator[dict[int, int]]:
    """Gives a dictionary storage -> bytes that collects every tensor that autograd saves in the block.

    With `fused`, attention saves what fused kernels save. Both hooks affect only this thread and this block.
    """
    own = {weight.untyped_storage()._cdata for weight in weights}
    seen: dict[int, int] = {}
    kept: list[Tensor] = []  # keeps storages alive, because a freed one's number may be reused

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in seen:
            seen[storage._cdata] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), _Fused() if fused else nullcontext():
        yield seen


class _Fused(TorchFunctionMode):
    """Replaces every attention call inside the block with `_attention`."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        called = _attention if func is functional.scaled_dot_product_attention else func
        return called(*args, **(kwargs or {}))


class _FusedAttention(torch.autograd.Function):
    """Saves what a fused kernel saves: q, k, v and the output. On the meta device torch saves the whole matrix."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError("nothing is computed on the meta device")


def _attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **settings: Any) -> Tensor:
    apply: Callable[..., Tensor] = _FusedAttention.apply
    return apply(query, key, value)


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f}M" if count < 1e7 else f"{count / 1e6:,.0f}M"


def _size(size: float) -> str:
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"
