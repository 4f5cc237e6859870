"""New words for a base: what tokenizers and encoders make of them, against plain tables; schedules; bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from finetune.config.load import parse_recipe
from finetune.core.errors import BadInput
from finetune.families.base import Family
from finetune.families.registry import FAMILIES
from finetune.families.source import load_family
from finetune.jobs import train as job
from finetune.jobs.prepare import prepare
from finetune.methods.embeddings import embeddings, extensions, set_embeddings
from finetune.methods.pivotal import Pivotal
from finetune.methods.textual_inversion import TextualInversion
from finetune.optim.adamw import AdamW
from finetune.sampling.draw import draw
from finetune.sampling.settings import Sampling

NAMES = list(FAMILIES)
WITH_POOLED = [name for name in NAMES if name in ("sdxl", "sd3", "flux")]


def named(base: Path, method: TextualInversion, dtype: torch.dtype = torch.float32) -> tuple[Family, str]:
    family = load_family(str(base), dtype=dtype)
    return family, method.add_subject_token(family, "zwx", "mug")


def clip_tokenizers(family: Family) -> list:
    return [
        t for part, t in zip(family.text_encoders, family.tokenizers, strict=True) if part in family.naming.prefixes
    ]


@pytest.mark.parametrize("name", NAMES)
def test_the_placeholder_is_all_vectors_to_clip_and_the_initialiser_to_t5(
    name: str, tiny_bases: dict[str, Path]
) -> None:
    clean = load_family(str(tiny_bases[name]))
    family, placeholder = named(tiny_bases[name], TextualInversion(vectors=3))
    assert placeholder == "<zwx>"
    for text in ("a photo of {}, on", "{}", "A {} dog", "a {} and a {}"):
        for plain, tokenizer in zip(clean.tokenizers, family.tokenizers, strict=True):
            ids = tokenizer(text.format(*["<ZwX>"] * 2))["input_ids"]
            if tokenizer not in clip_tokenizers(family):
                assert ids == plain(text.format(*["mug"] * 2))["input_ids"]
                continue
            mug, size = plain.convert_tokens_to_ids("mug</w>"), len(plain)
            wanted = plain(text.format(*["mug"] * 2))["input_ids"]
            assert ids == [k for n in wanted for k in (range(size, size + 3) if n == mug else [n])]
            assert tokenizer("a red mug zwx")["input_ids"] == plain("a red mug zwx")["input_ids"]


@pytest.mark.parametrize("name", NAMES)
def test_step_0_is_the_prompt_with_the_initialisers_words_in_place(name: str, tiny_bases: dict[str, Path]) -> None:
    """Two vectors that begin as "red car", in the middle of a prompt, through every encoder."""
    clean = load_family(str(tiny_bases[name]))
    family, placeholder = named(tiny_bases[name], TextualInversion(vectors=2, init="red car"))
    wanted = clean.encode_prompts(["a photo of red car on the beach", "a dog"])
    found = family.encode_prompts([f"a photo of {placeholder} on the beach", "a dog"])
    for key, value in wanted.items():
        assert torch.equal(found[key], value), key


def test_the_lookup_is_that_of_one_long_table(tiny_bases: dict[str, Path]) -> None:
    """Rows and their gradient against nn.functional.embedding over the table with the rows below it."""
    family, _ = named(tiny_bases["sd1"], TextualInversion(vectors=2))
    trained = TextualInversion(vectors=2).attach(family, 0)
    ((name, rows),) = trained.items()
    (table,) = [table for _, _, table in extensions(family)]
    nn.init.normal_(rows)
    size = len(table.base_layer.weight)
    ids = torch.tensor([[0, 5, size, size + 1], [size - 1, size + 1, 3, size + 1]])
    long = torch.cat([table.base_layer.weight, rows.detach()]).requires_grad_()
    weight = torch.randn(2, 4, rows.shape[1])
    (table(ids) * weight).sum().backward()
    (nn.functional.embedding(ids, long) * weight).sum().backward()
    assert torch.equal(table(ids), nn.functional.embedding(ids, long))
    assert torch.allclose(rows.grad, long.grad[size:])
    assert name == "text_encoder.embeddings.token_embedding.new.rows"
    assert table.base_layer.weight.grad is None


def test_a_prompt_without_the_word_gives_the_rows_a_gradient_of_zero(tiny_bases: dict[str, Path]) -> None:
    """DDP waits for a gradient of every parameter in every step, also where captions are dropped."""
    family, _ = named(tiny_bases["sd1"], TextualInversion())
    (rows,) = TextualInversion().attach(family, 0).values()
    family.encode_prompts(["", "a mug"])["hidden"].sum().backward()
    assert torch.equal(rows.grad, torch.zeros_like(rows))


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_kept_norms_are_the_vocabularys_mean_and_only_directions_move(name: str, tiny_bases: dict[str, Path]) -> None:
    """arXiv:2512.13672: e = m* v / |v|; a step along v changes nothing."""
    method = TextualInversion(vectors=2, norm="keep")
    family, placeholder = named(tiny_bases[name], method)
    tables = {part: table.base_layer.weight for part, _, table in extensions(family)}
    means = {part: float(table.square().sum(1).sqrt().mean()) for part, table in tables.items()}
    trained = method.attach(family, 0)
    mug = family.tokenizers[0].convert_tokens_to_ids("mug</w>")
    for part, rows in embeddings(family).items():
        assert torch.cosine_similarity(rows[0], tables[part][mug], dim=0) == pytest.approx(1, abs=1e-6)
    optimizer = torch.optim.AdamW(trained.values(), lr=0.1, weight_decay=0.3)
    before = embeddings(family)
    for _ in range(3):
        target = torch.randn(1, generator=torch.Generator().manual_seed(1))
        (family.encode_prompts([f"a {placeholder}"])["hidden"].square().mean() - target).square().backward()
        for rows in trained.values():
            along, gradient = (rows.grad * rows.detach()).sum(1).abs(), rows.grad.norm(dim=1)
            assert bool((along < 1e-5 * gradient * rows.detach().norm(dim=1) + 1e-9).all())
        optimizer.step()
        optimizer.zero_grad()
    for part, rows in embeddings(family).items():
        assert rows.square().sum(1).sqrt().tolist() == pytest.approx([means[part]] * 2, rel=1e-5)
        assert not torch.equal(rows, before[part])


@pytest.fixture(scope="module")
def legacy_bases(tiny_bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bases whose text encoders' configs say `eos_token_id: 2`, as those of SDXL and old CLIPs do."""
    root = tmp_path_factory.mktemp("legacy")
    for name in WITH_POOLED:
        shutil.copytree(tiny_bases[name], root / name)
        for file in (root / name).glob("text_encoder*/config.json"):
            config = json.loads(file.read_text())
            if config["model_type"].startswith("clip"):
                file.write_text(json.dumps(config | {"eos_token_id": 2}))
    return {name: root / name for name in WITH_POOLED}


@pytest.mark.parametrize("name", WITH_POOLED)
def test_the_pooled_vector_stays_at_the_end_of_the_text(
    name: str, legacy_bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = load_family(str(legacy_bases[name]))
    prompts = ["a photo of mug on the beach", "", "a red dog", "a " * 40]
    family, placeholder = named(legacy_bases[name], TextualInversion())
    with pytest.warns(UserWarning, match="longer than"):
        before, after = (each.encode_prompts(prompts)["pooled"] for each in (clean, family))
    assert torch.equal(before, after)
    text = f"a photo of {placeholder} on the beach"
    wanted = clean.encode_prompts(["a photo of mug on the beach"])["pooled"]
    assert torch.equal(family.encode_prompts([text])["pooled"], wanted)
    monkeypatch.setattr("finetune.methods.textual_inversion.fix_eos_token_id", lambda encoder, tokenizer: False)
    broken, _ = named(legacy_bases[name], TextualInversion())
    assert not torch.allclose(broken.encode_prompts([text])["pooled"], wanted)


def test_a_bf16_base_stays_bf16_and_draws(tiny_bases: dict[str, Path]) -> None:
    for name in ("sd1", "sdxl"):
        family, placeholder = named(tiny_bases[name], TextualInversion(), torch.bfloat16)
        trained = TextualInversion().attach(family, 0)
        assert {rows.dtype for rows in trained.values()} == {torch.float32}
        assert family.parts["text_encoder"].dtype == torch.bfloat16
        assert {value.dtype for value in family.encode_prompts([f"a {placeholder}"]).values()} == {torch.bfloat16}
        family.encode_prompts([f"a {placeholder}"])["hidden"].float().square().mean().backward()
        assert all(rows.grad.dtype == torch.float32 for rows in trained.values())
        plain = load_family(str(tiny_bases[name]), dtype=torch.bfloat16)
        drawn = draw(family, [f"a photo of {placeholder}"], Sampling(steps=2), seeds=[0])
        assert drawn[0].tobytes() == draw(plain, ["a photo of mug"], Sampling(steps=2), seeds=[0])[0].tobytes()


@pytest.mark.parametrize(
    ("method", "token", "noun", "said"),
    [
        ({}, "zwx", None, "method.init is missing"),
        ({}, "zwx", "unknownword", "splits the initialiser 'unknownword' into 11 tokens"),
        ({"init": "red mug"}, "zwx", None, r"'red mug' has 2 words but method\.vectors is 1"),
        ({}, "two words", "mug", "'two words' can't name new embeddings"),
        ({}, "<a>b>", "mug", "can't name new embeddings"),
    ],
)
def test_names_and_initialisers_that_cannot_be(
    method: dict, token: str, noun: str | None, said: str, tiny_bases: dict[str, Path]
) -> None:
    with pytest.raises(BadInput, match=said) as caught:
        TextualInversion(**method).add_subject_token(load_family(str(tiny_bases["sdxl"])), token, noun)
    assert "\n" not in str(caught.value)


def test_a_name_that_the_base_has_already_is_refused(tiny_bases: dict[str, Path]) -> None:
    family, _ = named(tiny_bases["sd1"], TextualInversion())
    with pytest.raises(BadInput, match="'<zwx_0>' already: give another name"):
        TextualInversion().add_subject_token(family, "zwx", "mug")


def test_auto_is_called_subject(tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases["sd1"]))
    assert TextualInversion().add_subject_token(family, "auto", "mug") == "<subject>"


def test_attaching_before_naming_is_told(tiny_bases: dict[str, Path]) -> None:
    with pytest.raises(TypeError, match="call add_subject_token before attach"):
        TextualInversion().attach(load_family(str(tiny_bases["sd1"])), 0)


def test_weights_of_another_shape_are_refused(tiny_bases: dict[str, Path]) -> None:
    one, two = TextualInversion(), TextualInversion(vectors=2)
    (first, _), (second, _) = named(tiny_bases["sd1"], one), named(tiny_bases["sd1"], two)
    with pytest.raises(BadInput, match="do not fit the recipe: 1 weights"):
        two.load_state_dict(second, one.state_dict(first))


def recipe(base: Path, photos: Path, method: dict, **sections: dict) -> dict:
    return {
        "base": str(base),
        "data": {"photos": str(photos), "token": "zwx", "class_noun": "mug"},
        "method": method,
        "optim": {"kind": "adamw", "lr": 1e-2},
        "run": {"steps": 2},
        "sample": {"count": 1, "steps": 1, "prompts": ["a photo of {token}"]},
    } | sections


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": {"kind": "textual_inversion", "parts": ["denoiser"]}}, "trains embeddings of text encoders only"),
        ({"method": {"kind": "textual_inversion", "vectors": 0}}, "method.vectors is 0"),
        ({"method": {"kind": "textual_inversion", "norm": "fix"}}, "method.norm is 'fix'"),
        ({"method": {"kind": "pivotal", "pivot": 1.0}}, "method.pivot is 1.0"),
        (
            {"method": {"kind": "pivotal"}, "optim": {"kind": "prodigy"}},
            "optim.kind prodigy changes weights that",
        ),
        (
            {"method": {"kind": "pivotal"}, "optim": {"kind": "schedule_free"}},
            "method.kind pivotal does not train in every step",
        ),
    ],
)
def test_recipes_that_cannot_be(change: dict, said: str, photos: Path) -> None:
    with pytest.raises(BadInput) as caught:
        parse_recipe(recipe(Path("tiny"), photos, {"kind": "textual_inversion"}) | change)
    assert said in str(caught.value)


def test_text_lr_is_of_use_to_both(photos: Path) -> None:
    for kind in ("textual_inversion", "pivotal"):
        optim = {"kind": "adamw", "lr": 1e-3, "text_lr": 1e-2}
        assert parse_recipe(recipe(Path("tiny"), photos, {"kind": kind}, optim=optim)).optim.text_lr == 1e-2


@pytest.mark.parametrize(
    ("kind", "formats", "said"),
    [
        (
            "textual_inversion",
            ["kohya"],
            "a kohya file can't hold new embeddings, which this run trains",
        ),
        ("pivotal", ["folder"], "a folder file can't hold an adapter or new embeddings"),
        ("lora", ["embedding"], "an embedding file can't hold an adapter"),
        ("full", ["embedding"], "an embedding file can't hold whole weights"),
    ],
)
def test_a_format_that_cannot_hold_it_is_refused_at_once(
    kind: str, formats: list[str], said: str, tiny_bases: dict[str, Path], photos: Path
) -> None:
    with pytest.raises(BadInput, match=said):
        prepare(parse_recipe(recipe(tiny_bases["sd1"], photos, {"kind": kind}, export={"formats": formats})))


# schedules of pivotal tuning


def test_a_rate_of_0_leaves_weights_bit_identical() -> None:
    """AdamW with weight decay and warm moments: what the windows of pivotal tuning rest on."""
    torch.manual_seed(0)
    waits, goes = nn.Parameter(torch.randn(50)), nn.Parameter(torch.randn(50))
    settings = AdamW(lr=0.1, weight_decay=0.5)
    optimizer = settings.build({"text_encoder.new.rows": waits, "denoiser.w": goes}, {"denoiser.w": (0.5, 1.0)})
    start = waits.detach().clone(), goes.detach().clone()
    for step in range(4):
        for value in (waits, goes):
            value.grad = torch.randn(50) * 1e3
        settings.set_lr(optimizer, step, 8)
        optimizer.step()
    assert torch.equal(goes, start[1])
    assert not torch.equal(waits, start[0])


def test_each_window_has_its_own_schedule() -> None:
    """Warm-up and cosine over the window's own steps, 0 outside of it; the whole run is as it was."""
    settings, plain = AdamW(lr=1.0, schedule="cosine", warmup=2), AdamW(lr=1.0, schedule="cosine", warmup=2)
    parameters = {"denoiser.w": nn.Parameter(torch.zeros(1)), "text_encoder.new.rows": nn.Parameter(torch.zeros(1))}
    windows = {"denoiser.w": (0.4, 1.0), "text_encoder.new.rows": (0.0, 0.4)}
    optimizer = settings.build(parameters, windows)
    rates = []
    for step in range(10):
        settings.set_lr(optimizer, step, 10)
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert [rate for rate, _ in rates] == [0.0] * 4 + [plain.factor(step, 6) for step in range(6)]
    assert [rate for _, rate in rates] == [plain.factor(step, 4) for step in range(4)] + [0.0] * 6
    assert [settings.factor_within((0.0, 1.0), n, 10) for n in range(10)] == [plain.factor(n, 10) for n in range(10)]


@pytest.mark.parametrize("keep", [False, True])
def test_first_the_token_then_the_lora(keep: bool, tiny_bases: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    """Checkpoints of every step: until the pivot the LoRA stands still bit for bit, after it the token."""
    method = {"kind": "pivotal", "pivot": 0.5, "rank": 2, "keep_training_token": keep}
    run = {"steps": 4, "checkpoint_every": 1, "keep": 9}
    made = job.train(parse_recipe(recipe(tiny_bases["sd1"], photos, method, run=run)), tmp_path / "run")
    steps = [load_file(made / "checkpoints" / f"step-{n:06d}" / "trained.safetensors") for n in (1, 2, 3, 4)]
    for before, after, first_half in ((0, 1, True), (1, 2, False), (2, 3, False)):
        for key, value in steps[before].items():
            still = torch.equal(value, steps[after][key])
            token = key.endswith("new.rows")
            assert still == (not token if first_half else token and not keep), (after, key)
    start = Pivotal(rank=2).adapter
    family = load_family(str(tiny_bases["sd1"]))
    for key, value in start.attach(family, 0).items():
        assert torch.equal(value, steps[1][key]), key


def test_pivotal_has_the_loras_settings() -> None:
    method = Pivotal(rank=3, alpha=2, dropout=0.1, targets="attention", rank_stabilised=True, parts=["denoiser"])
    shared = method.adapter.model_dump(exclude={"kind", "init"})  # `init` is the word there
    assert shared == {key: getattr(method, key) for key in shared}
    assert (method.adapter.rank, method.adapter.alpha, method.adapter.targets) == (3, 2.0, "attention")


def test_embeddings_are_set_whatever_the_norm_was(tiny_bases: dict[str, Path]) -> None:
    family, placeholder = named(tiny_bases["sd1"], TextualInversion(norm="keep"))
    other, _ = named(tiny_bases["sd1"], TextualInversion())
    set_embeddings(other, embeddings(family))
    text = [f"a {placeholder}"]
    assert torch.equal(other.encode_prompts(text)["hidden"], family.encode_prompts(text)["hidden"])
