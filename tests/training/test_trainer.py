"""The loop: its loss against the formula, exact resume, accumulation, EMA, the stop before a bad update, fp16."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from ends import metrics
from safetensors.torch import load_file

from finetune.core.batch import Batch, Geometry, Latents
from finetune.core.errors import BadInput, CheckFailed
from finetune.core.events import sent_to
from finetune.core.rng import SampleKey, normal, uniform
from finetune.families.source import load_family
from finetune.methods.base import Method
from finetune.methods.dora import DoRA
from finetune.methods.full import Full
from finetune.methods.lokr import LoKr
from finetune.methods.lora import LoRA
from finetune.objectives.registry import build_objective
from finetune.objectives.settings import ObjectiveSettings
from finetune.optim.adamw import AdamW
from finetune.optim.adamw8bit import AdamW8bit
from finetune.optim.registry import Optim
from finetune.runs.metrics import MetricsFile
from finetune.training.accelerate import make_accelerator
from finetune.training.checkpoint import Checkpoints
from finetune.training.priors.base import PriorSettings
from finetune.training.priors.none import NoPrior
from finetune.training.regularizers import PriorContext
from finetune.training.settings import Run
from finetune.training.step import Step, StepOptions, parts_of
from finetune.training.trainer import Trainable, Trainer


class Memory:
    """Batches from memory: eight latents, two captions, the cut by accumulation and rank as in the data plan."""

    def __init__(
        self, size: int = 4, accumulate: int = 1, rank: int = 0, world: int = 1, bad_at: int = -1, channels: int = 4
    ) -> None:
        made, shape = torch.Generator().manual_seed(0), (8, channels, 16, 16)
        self.mean, self.std = torch.randn(shape, generator=made), torch.rand(shape, generator=made) * 0.1
        self.part, self.rank, self.world, self.bad_at = size // accumulate // world, rank, world, bad_at

    def micro(self, step: int, index: int) -> Batch:
        start = (index * self.world + self.rank) * self.part
        draws = [SampleKey(0, step, slot) for slot in range(start, start + self.part)]
        chosen = [(step * 3 + draw.sample) % 8 for draw in draws]
        mean = self.mean[chosen] * (float("nan") if step == self.bad_at else 1)
        prompts = [("a photo of a zwx mug", "a mug")[k % 2] for k in chosen]
        square = [Geometry((32, 32), (0, 0), (32, 32))] * self.part
        weight = torch.tensor([1.0 + 0.5 * (k % 2) for k in chosen])
        return Batch(Latents(mean, self.std[chosen]), prompts, weight, square, draws, [f"{k}.png" for k in chosen])


def run_fit(
    base: Path,
    folder: Path,
    method: Method,
    *,
    optim: Optim | None = None,
    steps: int = 4,
    accumulate: int = 1,
    batches: Memory | None = None,
    make: Callable[[Run, bool], Accelerator] = make_accelerator,
    prior: PriorSettings | None = None,
    **settings: object,
) -> dict[str, torch.Tensor]:
    run = Run(steps=steps, batch_size=4, accumulate=accumulate, **settings)
    accelerator = make(run, method.is_adapter)
    family = load_family(str(base))
    trained = method.attach(family, 0)
    attached = PriorContext(family, method, trained, family.encode_prompts, "a mug")
    objective = build_objective(ObjectiveSettings(weighting="min_snr"), family.schedule)
    options = StepOptions(regularizers=(prior or NoPrior()).regularizers(attached))
    trainer = Trainer(
        Step(family, parts_of(trained), objective, family.encode_prompts, options),
        Trainable(trained),
        optim or AdamW(lr=1e-3, schedule="cosine", warmup=2),
        run,
        accelerator,
        Checkpoints(folder),
    )
    with sent_to(MetricsFile(folder)):
        trainer.fit(batches or Memory(4, accumulate, accelerator.process_index, accelerator.num_processes))
    return {name: value.detach().clone() for name, value in trained.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    return path


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_the_loss_of_a_flow_is_the_papers(name: str, tiny_bases: dict[str, Path]) -> None:
    """arXiv:2403.03206 eq. 13 with logit-normal timesteps, written out sample by sample."""
    family = load_family(str(tiny_bases[name]))
    batch = Memory(channels=16).micro(2, 0)
    loss = Step(family, [], build_objective(ObjectiveSettings(), family.schedule, 2.0), family.encode_prompts)(batch)
    total = 0.0
    for k, draw in enumerate(batch.keys):
        x0 = batch.latents.mean[k] + batch.latents.std[k] * normal([draw], (16, 16, 16), "vae")[0]
        noise = normal([draw], (16, 16, 16), "noise")[0]
        t = torch.sigmoid(torch.distributions.Normal(0, 1).icdf(uniform([draw], "timestep")))
        t = 2 * t / (1 + t)
        cond = family.encode_prompts([batch.prompts[k]])
        predicted = family.predict(((1 - t) * x0 + t * noise)[None], 1000 * t, cond, [batch.geometry[k]])[0]
        total += float(batch.weight[k]) * float((predicted - (noise - x0)).square().mean())
    assert float(loss) == pytest.approx(total / 4, rel=1e-4)


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_the_loss_is_the_papers(name: str, tiny_bases: dict[str, Path]) -> None:
    """mean_i w_i w(t_i) |prediction - target|^2, written out sample by sample."""
    family = load_family(str(tiny_bases[name]))
    objective = build_objective(ObjectiveSettings(weighting="min_snr"), family.schedule)
    batch = Memory().micro(2, 0)
    loss = Step(family, [], objective, family.encode_prompts)(batch)
    total = 0.0
    for k, draw in enumerate(batch.keys):
        x0 = batch.latents.mean[k] + batch.latents.std[k] * normal([draw], (4, 16, 16), "vae")[0]
        noise = normal([draw], (4, 16, 16), "noise")[0]
        t = int(float(uniform([draw], "timestep")) * 1000)
        abar = family.drawing.scheduler.alphas_cumprod[t]
        noisy = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
        cond = family.encode_prompts([batch.prompts[k]])
        predicted = family.predict(noisy[None], torch.tensor([t]), cond, [batch.geometry[k]])[0]
        v = name == "sd2"
        target = abar.sqrt() * noise - (1 - abar).sqrt() * x0 if v else noise
        snr = float(abar / (1 - abar))
        weight = min(snr, 5) / (snr + v)
        total += weight * float(batch.weight[k]) * float((predicted - target).square().mean())
    assert float(loss) == pytest.approx(total / 4, rel=1e-4)


def resumed_is_the_unbroken_run(base: Path, folder: Path, method: Method, **settings: Any) -> list[dict]:
    """A run of two micro-batches whose fourth step is not finite, started again: weights bit for bit, and metrics.

    Returns the metrics of the run that ended there."""
    whole, cut = folder / "whole", folder / "cut"
    whole.mkdir()
    cut.mkdir()
    wanted = run_fit(base, whole, method, accumulate=2, **settings)
    with pytest.raises(CheckFailed):
        run_fit(base, cut, method, batches=Memory(4, 2, bad_at=3), accumulate=2, **settings)
    ended = metrics(cut)
    resumed = run_fit(base, cut, method, accumulate=2, **settings)
    assert all(torch.equal(wanted[name], resumed[name]) for name in wanted)
    assert metrics(cut) == metrics(whole)
    return ended


METHODS = {
    "lora": LoRA(rank=4, dropout=0.2, parts=["denoiser", "text_encoders"]),
    "dora": DoRA(rank=4, dropout=0.2, parts=["denoiser", "text_encoders"]),
    "lokr": LoKr(rank=2),
    "full": Full(parts=["denoiser", "text_encoders"]),
}


@pytest.mark.parametrize("kind", list(METHODS))
@pytest.mark.parametrize("optim", [AdamW(lr=1e-3), AdamW8bit(lr=1e-3)], ids=["adamw", "adamw8bit"])
def test_killed_and_resumed_is_the_unbroken_run(
    kind: str, optim: Optim, tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    """Bit for bit, weights and metrics, with dropout, accumulation and EMA on; killed between two checkpoints."""
    settings = {"optim": optim, "ema": 0.9, "checkpoint_every": 2, "steps": 6}
    ended = resumed_is_the_unbroken_run(tiny_bases["sdxl"], tmp_path, METHODS[kind], **settings)
    assert [row["step"] for row in ended] == [1, 2, 3]


def test_accumulation_gives_the_whole_batchs_step(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    results = []
    for accumulate in (1, 2, 4):
        path = tmp_path / str(accumulate)
        path.mkdir()
        results.append((run_fit(tiny_bases["sd1"], path, Full(), accumulate=accumulate), metrics(path)))
    for weights, rows in results[1:]:
        assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in results[0][1]], rel=1e-5)
        assert all(torch.allclose(weights[n], results[0][0][n], atol=2e-5) for n in weights)


def test_clipping_limits_the_step_and_reports_the_norm_before(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    norms = []
    for limit in (0.0, 1e-3):
        path = tmp_path / str(limit)
        path.mkdir()
        run_fit(tiny_bases["sd1"], path, Full(), steps=1, optim=AdamW(lr=1e-3, max_grad_norm=limit))
        norms.append(metrics(path)[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1]) != 0


def test_ema_is_the_formula_and_is_what_leaves_the_run(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    plain, averaged = tmp_path / "plain", tmp_path / "ema"
    plain.mkdir()
    averaged.mkdir()
    run_fit(tiny_bases["sd1"], plain, LoRA(rank=2), steps=3, checkpoint_every=1, keep=3)
    result = run_fit(tiny_bases["sd1"], averaged, LoRA(rank=2), steps=3, ema=0.9)
    start = LoRA(rank=2).attach(load_family(str(tiny_bases["sd1"])), 0)
    wanted = {name: value.detach().clone() for name, value in start.items()}
    from safetensors.torch import load_file

    for n in range(3):
        now = load_file(plain / "checkpoints" / f"step-{n + 1:06d}" / "trained.safetensors")
        decay = min(0.9, (1 + n) / (10 + n))
        wanted = {name: decay * value + (1 - decay) * now[name] for name, value in wanted.items()}
    assert all(torch.allclose(result[name], wanted[name], atol=1e-6) for name in wanted)


def test_a_bad_step_stops_before_the_update(tiny_bases: dict[str, Path], folder: Path) -> None:
    """Step 3 of four samples in two micro-batches: all are named with their timesteps, and kept as they were."""
    batches = Memory(4, 2, bad_at=2)
    with pytest.raises(
        CheckFailed, match=r"step 3 is not finite \(loss nan\) on 6\.png \(timestep \d+\), 7\.png .*lr"
    ):
        run_fit(tiny_bases["sd1"], folder, LoRA(rank=2), batches=batches, accumulate=2, checkpoint_every=2)
    facts = json.loads((folder / "bad-step-000003" / "step.json").read_text())
    draws = [SampleKey(0, 2, slot) for slot in range(4)]
    assert [item["timestep"] for item in facts["samples"]] == [int(u * 1000) for u in uniform(draws, "timestep")]
    assert [item["name"] for item in facts["samples"]] == ["6.png", "7.png", "0.png", "1.png"]
    kept = load_file(folder / "bad-step-000003" / "latents.safetensors")
    assert torch.equal(kept["0003.std"], batches.std[1])
    assert bool(kept["0003.mean"].isnan().all())
    state = Checkpoints(folder).latest()
    assert state is not None
    assert state.step == 2
    assert all(bool(torch.isfinite(value).all()) for value in state.trained.values())


def test_stratified_timesteps_fill_every_part_once(tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases["sd1"]))
    objective = build_objective(ObjectiveSettings(), family.schedule)
    step = Step(family, [], objective, family.encode_prompts, StepOptions(stratify=8))
    positions = step.positions([SampleKey(0, 5, slot) for slot in range(8)])
    assert sorted((positions * 8).int().tolist()) == list(range(8))


@pytest.fixture
def _own_precision() -> Iterator[None]:
    """Accelerate keeps one precision for the whole program."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def with_scaler(run: Run, adapter: bool) -> Accelerator:
    """Its first steps overflow, as their losses are scaled by 2^127 and 2^87."""
    accelerator = Accelerator(mixed_precision="fp16", gradient_accumulation_steps=run.accumulate, cpu=True)
    accelerator.native_amp = True  # as on a GPU: autocast, and gradients unscaled before they are clipped
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-40)
    return accelerator


@pytest.mark.usefixtures("_own_precision")
def test_under_fp16_an_overflow_is_the_scalers_to_handle(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """torch's own scaler, on the CPU, begun far too high: the first steps overflow, are skipped, and are no error; its
    state is in the checkpoint, so that the resumed run is the unbroken one."""

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    with pytest.warns(UserWarning, match=r"^\d of the 6 steps changed no weight, .* more run\.steps") as told:
        unbroken = run_fit(tiny_bases["sd1"], whole, LoRA(rank=2), make=with_scaler, steps=6)
    norms = [row["grad_norm"] for row in metrics(whole)]
    skipped = sum(not math.isfinite(norm) for norm in norms)
    assert f"{skipped} of the 6" in str([str(each.message) for each in told])
    assert math.isfinite(norms[-1])
    run_fit(tiny_bases["sd1"], broken, LoRA(rank=2), make=with_scaler, steps=6, checkpoint_every=3)
    for late in (broken / "checkpoints").glob("step-000006"):
        shutil.rmtree(late)
    resumed = run_fit(tiny_bases["sd1"], broken, LoRA(rank=2), make=with_scaler, steps=6)
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)
    start = LoRA(rank=2).attach(load_family(str(tiny_bases["sd1"])), 0)
    assert any(not torch.equal(start[name], unbroken[name]) for name in unbroken)


@pytest.mark.usefixtures("_own_precision")
@pytest.mark.parametrize("optim", [AdamW(lr=1e-3), AdamW8bit(lr=1e-3)], ids=["fused", "not fused"])
def test_a_run_that_took_no_step_is_no_success(optim: Optim, tiny_bases: dict[str, Path], folder: Path) -> None:
    """Both of its steps overflow. It says so again when it is resumed, and ends well with enough steps."""
    start = LoRA(rank=2).attach(load_family(str(tiny_bases["sd1"])), 0)
    for _ in range(2):
        with pytest.raises(CheckFailed, match=r"^none of the 2 steps changed a weight, .*run\.precision=fp32"):
            run_fit(tiny_bases["sd1"], folder, LoRA(rank=2), make=with_scaler, optim=optim, steps=2)
    state = Checkpoints(folder).latest()
    assert state is not None
    assert all(torch.equal(start[name], state.trained[name]) for name in start)
    longer = run_fit(tiny_bases["sd1"], folder, LoRA(rank=2), make=with_scaler, optim=optim, steps=6)
    assert any(not torch.equal(start[name], longer[name]) for name in longer)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),  # three of four steps would change no weight
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"),
        ("ACCELERATE_USE_FSDP", "true"),
        ("ACCELERATE_USE_DEEPSPEED", "1"),
    ],
)
def test_accelerates_variables_do_not_change_what_is_trained(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match=f"^{name} is .*unset it"):
        make_accelerator(Run(), True)


@pytest.mark.parametrize(
    ("name", "value"),
    [("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"), ("ACCELERATE_DYNAMO_BACKEND", "NO")],
)
def test_variables_that_say_the_same_are_no_fault(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert make_accelerator(Run(), True).gradient_accumulation_steps == 1
