"""Prior preservation without class images: both penalties against their formulas, and in the loop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ends import metrics
from peft.tuners.tuners_utils import BaseTunerLayer
from test_train import LORA, settings
from test_trainer import Memory, _own_precision, resumed_is_the_unbroken_run, run_fit  # noqa: F401 - a fixture
from torch import Tensor

from finetune.config.load import parse_recipe
from finetune.core.batch import Batch
from finetune.core.rng import normal, uniform
from finetune.families.base import Family
from finetune.families.registry import FAMILIES
from finetune.families.source import load_family
from finetune.jobs import train as job
from finetune.methods.base import Method
from finetune.methods.full import Full
from finetune.methods.lora import LoRA
from finetune.methods.start import low_rank_distance
from finetune.objectives.registry import build_objective
from finetune.objectives.settings import ObjectiveSettings
from finetune.optim.adamw import AdamW
from finetune.training.priors.base import PriorSettings
from finetune.training.priors.distance import Distance
from finetune.training.priors.frozen_base import FrozenBase
from finetune.training.regularizers import PriorContext
from finetune.training.step import Step, StepOptions

BOTH = ["denoiser", "text_encoders"]
METHODS: dict[str, Method] = {
    "lora": LoRA(rank=4, alpha=6, dropout=0.2, parts=BOTH),
    "full": Full(parts=BOTH),
}
PRIORS: dict[str, PriorSettings] = {"frozen_base": FrozenBase(weight=0.7), "distance": Distance(weight=0.01)}
every_method = pytest.mark.parametrize("kind", list(METHODS))
every_prior = pytest.mark.parametrize("prior", list(PRIORS))
every_family = pytest.mark.parametrize("name", list(FAMILIES))


def steps(family: Family, method: Method, prior: PriorSettings) -> tuple[dict[str, torch.nn.Parameter], Step, Step]:
    """The trained parameters, a step without the penalty and one with it, in training mode."""
    trained = method.attach(family, 0)
    attached = PriorContext(family, method, trained, family.encode_prompts, "a mug")
    objective = build_objective(ObjectiveSettings(), family.schedule)
    parts = method.part_names(family)
    plain = Step(family, parts, objective, family.encode_prompts)
    return (
        trained,
        plain,
        Step(
            family, parts, objective, family.encode_prompts, StepOptions(regularizers=prior.regularizers(attached))
        ).train(),
    )


def move(trained: dict[str, torch.nn.Parameter], by: float = 0.02) -> None:
    """As training would: every weight somewhere else."""
    made = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained.values():
            parameter += by * torch.randn(parameter.shape, generator=made)


def penalty(plain: Step, whole: Step, batch: Batch) -> float:
    with torch.no_grad():
        return float(whole(batch) - plain(batch))


def batch_for(family: Family) -> Batch:
    return Memory(channels=family.codec.channels).micro(2, 0)


@every_family
@every_method
@every_prior
def test_both_are_exactly_zero_at_the_start(name: str, kind: str, prior: str, tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases[name]))
    trained, plain, whole = steps(family, METHODS[kind], PRIORS[prior])
    assert penalty(plain, whole, batch_for(family)) == 0
    move(trained)
    assert penalty(plain, whole, batch_for(family)) > 0


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
@every_method
def test_frozen_base_is_the_formula(name: str, kind: str, tiny_bases: dict[str, Path]) -> None:
    """lambda mean_i w_i w(t_i) |pred(z, t, c) - pred_base(z, t, c)|^2, sample by sample, the base read from disk."""
    family, clean = (load_family(str(tiny_bases[name])) for _ in range(2))
    method = METHODS[kind].model_copy(update={"dropout": 0.0} if kind == "lora" else {})
    trained = method.attach(family, 0)
    attached = PriorContext(family, method, trained, family.encode_prompts, "a mug")
    (keep,) = FrozenBase(weight=0.7, caption_dropout=0.5).regularizers(attached)
    objective = build_objective(ObjectiveSettings(weighting="min_snr"), family.schedule)
    step = Step(family, method.part_names(family), objective, family.encode_prompts, StepOptions(regularizers=[keep]))
    move(trained)
    batch = Memory().micro(3, 0)
    with torch.no_grad():
        loss = step(batch)
        step.options = StepOptions()
        measured = float(loss - step(batch))
        total, seen = 0.0, set()
        for k, draw in enumerate(batch.keys):
            x0 = batch.latents.mean[k] + batch.latents.std[k] * normal([draw], (4, 16, 16), "vae")[0]
            t = int(float(uniform([draw], "timestep")) * 1000)
            abar = family.drawing.scheduler.alphas_cumprod[t]
            noisy = abar.sqrt() * x0 + (1 - abar).sqrt() * normal([draw], (4, 16, 16), "noise")[0]
            prompt = "" if float(uniform([draw], "class prompt")) < 0.5 else "a mug"
            seen.add(prompt)
            ours, theirs = (
                one.predict(noisy[None], torch.tensor([t]), one.encode_prompts([prompt]), [batch.geometry[k]])[0]
                for one in (family, clean)
            )
            snr = float(abar / (1 - abar))
            weight = min(snr, 5) / (snr + (name == "sd2")) * float(batch.weight[k])
            total += weight * float((ours - theirs).square().mean())
    assert seen == {"", "a mug"}
    assert measured == pytest.approx(0.7 * total / 4, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "targets"), [*((name, "all-linear") for name in FAMILIES), ("sd1", "conv"), ("sdxl", "conv")]
)
def test_the_distance_of_a_lora_is_that_of_the_formed_matrices(
    name: str, targets: str, tiny_bases: dict[str, Path]
) -> None:
    """sum of |s B A|^2 with B A formed by PEFT; value and gradient; rsLoRA's scale."""
    family = load_family(str(tiny_bases[name]))
    method = LoRA(rank=3, alpha=5, targets=targets, parts=BOTH, rank_stabilised=True)
    trained = method.attach(family, 0)
    distance = method.distance(family, trained)
    move(trained)
    layers = [m for p in method.part_names(family) for m in family.parts[p].modules() if isinstance(m, BaseTunerLayer)]
    formed = torch.stack([layer.get_delta_weight("default").square().sum() for layer in layers]).sum()
    kinds = {type(layer.get_base_layer()).__name__ for layer in layers}
    assert kinds == ({"Linear", "Conv2d"} if targets == "conv" or name == "sd1" else {"Linear"})
    value = distance()
    assert float(value) == pytest.approx(float(formed), rel=1e-5)
    wanted = torch.autograd.grad(formed, list(trained.values()))
    for own, other in zip(torch.autograd.grad(value, list(trained.values())), wanted, strict=True):
        assert torch.allclose(own, other, rtol=1e-4, atol=1e-6)


def test_the_trick_of_the_trace() -> None:
    a, b = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0], [-1.0]])
    assert float(low_rank_distance([(a, b, 0.5)])()) == pytest.approx(0.25 * 2 * 14)


@every_family
def test_the_distance_of_full_training_is_the_sum_over_its_weights(name: str, tiny_bases: dict[str, Path]) -> None:
    family, clean = (load_family(str(tiny_bases[name])) for _ in range(2))
    method = METHODS["full"]
    trained = method.attach(family, 0)
    distance = method.distance(family, trained)
    move(trained)
    start = {f"{part}.{n}": p for part in trained_parts(clean) for n, p in clean.parts[part].named_parameters()}
    wanted = sum(float((p.double() - start[n].double()).square().sum()) for n, p in trained.items())
    assert float(distance()) == pytest.approx(wanted, rel=1e-5)
    (gradient,) = torch.autograd.grad(distance(), [trained[next(iter(trained))]])
    first = next(iter(trained))
    assert torch.allclose(gradient, 2 * (trained[first] - start[first]), atol=1e-6)


def trained_parts(family: Family) -> list[str]:
    return METHODS["full"].part_names(family)


@every_family
@every_method
def test_the_base_stays_the_base_while_the_rest_trains(name: str, kind: str, tiny_bases: dict[str, Path]) -> None:
    """Three optimiser steps; then the teacher predicts what a base just read from disk predicts, bit for bit."""
    family, clean = (load_family(str(tiny_bases[name])) for _ in range(2))
    method, batch = METHODS[kind], batch_for(family)
    base = method.base_of(family) if kind == "full" else None
    trained, _, whole = steps(family, method, PRIORS["frozen_base"])
    base = base or method.base_of(family)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    flags = {n: p.requires_grad for n, p in trained.items()}
    for _ in range(3):
        whole(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert flags == {n: p.requires_grad for n, p in trained.items()}
    whole.eval()
    with torch.no_grad(), base() as old:
        assert torch.equal(predict(old, batch), predict(clean, batch))
    with torch.no_grad():
        assert not torch.equal(predict(family, batch), predict(clean, batch))


def predict(family: Family, batch: Batch) -> Tensor:
    cond = family.encode_prompts(["a mug"] * len(batch))
    return family.predict(batch.latents.mean, torch.tensor([20, 300, 600, 900]), cond, batch.geometry)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
@every_method
def test_checkpointing_gives_the_same_gradients(name: str, kind: str, tiny_bases: dict[str, Path]) -> None:
    """What is computed again in the backward is the adapted model, with the step's dropout."""
    gradients = []
    for checkpointing in (False, True):
        family = load_family(str(tiny_bases[name]))
        trained, _, whole = steps(family, METHODS[kind], FrozenBase(weight=5.0))
        move(trained)
        if checkpointing:
            family.enable_gradient_checkpointing(METHODS[kind].part_names(family))
        whole(batch_for(family)).backward()
        gradients.append({n: p.grad for n, p in trained.items()})
    for n, value in gradients[0].items():
        assert torch.allclose(value, gradients[1][n], rtol=1e-3, atol=1e-6), n


@every_method
@every_prior
def test_killed_and_resumed_is_the_unbroken_run(
    kind: str, prior: str, tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    """theta_0 and the teacher are the base's, not those of the checkpoint that the run goes on from."""
    own = {"prior": PRIORS[prior], "checkpoint_every": 2}
    resumed_is_the_unbroken_run(tiny_bases["sd1"], tmp_path, METHODS[kind], **own)


@every_method
@every_prior
def test_micro_batches_give_the_whole_batchs_gradient(kind: str, prior: str, tiny_bases: dict[str, Path]) -> None:
    """At a large weight: a penalty that were a sum over samples, or once a micro-batch, would show at once."""
    strong = PRIORS[prior].model_copy(update={"weight": 20.0})
    gradients = []
    for cut in (1, 2, 4):
        family = load_family(str(tiny_bases["sd1"]))
        trained, _, whole = steps(family, METHODS[kind], strong)
        move(trained)
        for index in range(cut):
            (whole(Memory(4, cut).micro(3, index)) / cut).backward()
        gradients.append({name: p.grad for name, p in trained.items()})
    for name, value in gradients[0].items():
        for other in gradients[1:]:
            assert torch.allclose(value, other[name], rtol=1e-3, atol=1e-5), name


@every_method
@every_prior
def test_an_accumulated_step_is_the_whole_batchs(
    kind: str, prior: str, tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    """Through Accelerate: loss and gradient norm of four steps."""
    strong = PRIORS[prior].model_copy(update={"weight": 20.0})
    rows = []
    for accumulate in (1, 2):
        path = tmp_path / str(accumulate)
        path.mkdir()
        run_fit(tiny_bases["sd1"], path, METHODS[kind], accumulate=accumulate, prior=strong)
        rows.append(metrics(path))
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in rows[1]] == pytest.approx([row[key] for row in rows[0]], rel=1e-3), key


@every_prior
def test_on_a_bf16_base_too(prior: str, tiny_bases: dict[str, Path]) -> None:
    """An adapter's base is held in bf16: 0 at the start, then a float32 number with finite gradients."""
    family = load_family(str(tiny_bases["sdxl"]), dtype=torch.bfloat16)
    trained, plain, whole = steps(family, METHODS["lora"], PRIORS[prior])
    assert penalty(plain, whole, batch_for(family)) == 0
    move(trained)
    loss = whole(batch_for(family))
    assert loss.dtype == torch.float32
    assert loss > plain(batch_for(family))
    loss.backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in trained.values())


@pytest.mark.usefixtures("_own_precision")
@every_prior
def test_full_training_in_bf16_begins_at_zero(prior: str, tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """fp32 weights under autocast: the twin computes under it too, so that both round alike."""
    rows = []
    for weight in (0.0, 50.0):
        path = tmp_path / str(weight)
        path.mkdir()
        strong = PRIORS[prior].model_copy(update={"weight": weight})
        run_fit(tiny_bases["sd1"], path, METHODS["full"], steps=2, prior=strong, precision="bf16")
        rows.append(metrics(path))
    assert rows[0][0] == rows[1][0]
    assert rows[0][1]["loss"] < rows[1][1]["loss"]


@every_prior
def test_a_heavy_penalty_keeps_the_model_nearer(prior: str, tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    apart = []
    for weight in (0.0, 1000.0):
        path = tmp_path / str(weight)
        path.mkdir()
        strong = PRIORS[prior].model_copy(update={"weight": weight})
        weights = run_fit(tiny_bases["sd1"], path, LoRA(rank=4), steps=8, optim=AdamW(lr=1e-3), prior=strong)
        apart.append(sum(float(value.square().sum()) for n, value in weights.items() if "lora_B" in n))
    assert apart[1] < 0.7 * apart[0]


@pytest.mark.parametrize(("method", "said"), [(LORA, "nothing is copied"), ({"kind": "full"}, "MB)")])
@every_prior
def test_a_job_without_class_images(
    prior: str, method: dict, said: str, tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    """The frozen encoders' class prompt is in the cache; the plan says what it costs; no class image is drawn."""
    lines: list[str] = []
    recipe = parse_recipe(settings(tiny_bases["sdxl"], photos, method, prior={"kind": prior, "weight": 0.5}))
    run = job.train(recipe, tmp_path / "run", lines.append)
    (line,) = [line for line in lines if line.split()[0] == "prior"]
    assert said in line
    assert ("'a photo of a mug'" in line) == (prior == "frozen_base")
    assert not any("class images" in line for line in lines)
    exported = json.loads((run / "exports.json").read_text())
    assert all(check.startswith("ok: ") for item in exported for check in item["checks"])
