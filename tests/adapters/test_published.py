"""A LoRA file tells its base by its header, or by the names and sizes of its modules."""

from __future__ import annotations

from pathlib import Path

import pytest
from adapter_files import diffusers_file, kohya_file, published, saved
from safetensors import safe_open

from finetune.adapters.bases import TITLES
from finetune.adapters.inspection import inspect_adapter, open_adapter
from finetune.adapters.operations import write
from finetune.cli.main import run
from finetune.core.errors import BadInput
from finetune.export.base import delta
from finetune.export.lora.kohya import key_table
from finetune.families.registry import family_of
from finetune.families.source import load_family, resolve_base

# parameters in millions, as the models' cards and papers give them
SIZES = {
    "sd1": ("sd1", {"denoiser": 859.5, "text_encoder": 123.1}),
    "sd2": ("sd2", {"denoiser": 865.9, "text_encoder": 340.4}),
    "sdxl": ("sdxl", {"denoiser": 2567.5, "text_encoder": 123.1, "text_encoder_2": 694.7}),
    "sd3-medium": ("sd3", {"denoiser": 2085.0, "text_encoder": 123.7, "text_encoder_2": 694.7}),
    "sd3.5-large": ("sd3", {"denoiser": 8146.3}),
    "flux-dev": ("flux", {"denoiser": 11901.4, "text_encoder": 123.1}),
    "flux-schnell": ("flux", {"denoiser": 11891.2}),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_published_configurations_have_the_published_sizes(name: str) -> None:
    family, sizes = SIZES[name]
    kind = family_of(published(name))
    assert kind.name == family
    parts = kind.skeletons(published(name))
    for part, millions in sizes.items():
        held = parts[part].state_dict().values()  # with SD3's table of positions
        assert sum(value.numel() for value in held) / 1e6 == pytest.approx(millions, abs=0.06), part


def test_the_names_are_as_many_as_kohya_writes() -> None:
    """kohya's log: "create LoRA for U-Net: 192 modules", SDXL 722, Flux 304; text encoders 72 and 72 + 192."""
    texts = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    attention = ("to_q", "to_k", "to_v", "to_out_0", "net_0_proj", "net_2", "proj_in", "proj_out")
    counts = {("sd1", "lora_unet_"): (192, attention), ("sdxl", "lora_unet_"): (722, attention)}
    counts |= {
        ("sd1", "lora_te_"): (72, texts),
        ("sdxl", "lora_te1_"): (72, texts),
        ("sdxl", "lora_te2_"): (192, texts),
    }
    tables = {name: key_table(published(name)) for name in ("sd1", "sdxl", "flux-dev")}
    for (name, prefix), (wanted, endings) in counts.items():
        assert sum(key.startswith(prefix) and key.endswith(endings) for key in tables[name]) == wanted, (name, prefix)
    assert sum("_blocks_" in key for key in tables["flux-dev"] if key.startswith("lora_unet_")) == 304


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sdxl-refiner", "sd3.5-medium", "sd3.5-large", "flux-dev"])
def test_a_file_without_a_header_tells_its_base_by_names_and_sizes(name: str, tmp_path: Path) -> None:
    for kind, tensors in (
        ("kohya", kohya_file(published(name), 17)),
        ("diffusers", diffusers_file(published(name), 17)),
    ):
        found = inspect_adapter(saved(tensors, tmp_path / f"{kind}.safetensors"))
        assert found.compared.folder.name == name
        assert (found.kind, found.family) == (kind, family_of(published(name)).name)
        assert TITLES[name] in found.compared.line
        assert "give --base to compare with your own" in found.compared.line
        assert [problem for problem in found.problems if problem.name != "no-alpha"] == []
        assert len(found.zero) == 0


@pytest.mark.parametrize(
    ("metadata", "name"),
    [
        ({"ss_base_model_version": "sd_v1"}, "sd1"),
        ({"ss_base_model_version": "sd_v2_v"}, "sd2"),
        ({"modelspec.architecture": "stable-diffusion-v1/lora"}, "sd1"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, "sd2"),
    ],
)
def test_a_header_decides_between_bases_that_fit_alike(metadata: dict[str, str], name: str, tmp_path: Path) -> None:
    """SD1 and SD2 share names and sizes outside the cross-attention."""
    tensors = {key: value for key, value in kohya_file(published("sd1")).items() if "attn1_to_q" in key}
    assert inspect_adapter(saved(tensors, tmp_path / "x.safetensors", metadata)).compared.folder.name == name
    with pytest.raises(BadInput, match=r"fits several published models \(SD 1.5, SD 2.1\).*--base"):
        inspect_adapter(saved(tensors, tmp_path / "x.safetensors"))


def test_a_file_of_no_published_model_asks_for_the_base(
    tiny_bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tiny base is chosen only if it is asked for, or if the header has its hash."""
    tensors = kohya_file(tiny_bases["sdxl"])
    file = saved(tensors, tmp_path / "x.safetensors")
    code, message = run(["verify", str(file)])
    assert (code, "--base" in message) == (2, True)
    assert "\n" not in message
    named = saved(tensors, tmp_path / "x.safetensors", {"ss_base_model_version": "sdxl_base_v1-0"})
    (problem,) = inspect_adapter(named).problems
    assert problem.name == "another-base"
    assert "published SDXL" in problem.message
    capsys.readouterr()
    assert run(["verify", str(file), "--base", str(tiny_bases["sdxl"])]) == (0, "")
    assert f"compared with the base {tiny_bases['sdxl']}" in capsys.readouterr().out


def test_the_tiny_base_is_known_by_its_hash(tmp_path: Path) -> None:
    from finetune.families.digests import base_hash

    tiny = resolve_base("tiny")
    tensors = kohya_file(tiny)
    file = saved(tensors, tmp_path / "x.safetensors", {"finetune_base_hash": base_hash(tiny)})
    found = inspect_adapter(file)
    assert found.compared.folder == tiny
    assert found.problems == []


def test_a_wrong_base_gets_one_short_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = saved(kohya_file(published("sdxl"), 3), tmp_path / "xl.safetensors")
    code, _ = run(["verify", str(file), "--base", str(published("sd1"))])
    said = capsys.readouterr().out
    problems = [line for line in said.splitlines() if "PROBLEM" in line]
    assert code == 1
    assert len(problems) == 1
    assert len(said) < 3000
    assert "the published SDXL configuration" in problems[0]
    assert problems[0].count(", there ") <= 3
    assert "fully" not in said


def test_a_wrong_header_is_told(tmp_path: Path) -> None:
    metadata = {"ss_base_model_version": "sdxl_base_v1-0"}
    found = inspect_adapter(saved(kohya_file(published("sd1"), 5), tmp_path / "x.safetensors", metadata))
    assert found.family == "sd1"
    assert any("header says sdxl" in note for note in found.notes)


def test_convert_and_back_without_a_base(tmp_path: Path) -> None:
    """Every delta is the closed form alpha / rank * up @ down of the file that came in."""
    tensors = kohya_file(published("sdxl"), 9, alpha=1.0)
    source, _ = open_adapter(saved(tensors, tmp_path / "x.safetensors"))
    (item,) = write(source, tmp_path / "y.safetensors", ["diffusers"], "fp32", False, {})
    assert item.ok
    assert item.path == tmp_path / "y.safetensors"
    again, _ = open_adapter(item.path)
    names = key_table(published("sdxl"))
    assert again.count == len(tensors) // 3
    for name in {key.split(".")[0] for key in tensors}:
        (module,) = names[name].modules
        a, b = again.layers[names[name].part][module]
        down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
        wanted = 0.5 * (up.flatten(1) @ down.flatten(1))
        assert (delta(a, b, again.scale).flatten(1) - wanted).norm() <= 1e-6 * wanted.norm()


def test_adapters_of_two_bases_are_not_merged(tmp_path: Path) -> None:
    one = saved(kohya_file(published("sd3.5-medium"), 7), tmp_path / "m.safetensors")
    other = saved(kohya_file(published("sd3.5-large"), 7), tmp_path / "l.safetensors")
    code, message = run(["merge", str(one), str(other), "--out", str(tmp_path / "sum")])
    assert code == 2
    assert "SD3.5 medium" in message
    assert "SD3.5 large" in message
    assert not (tmp_path / "sum.safetensors").exists()


def test_a_published_configuration_has_no_weights_to_load() -> None:
    """It is for comparing: a command that needs weights says so."""
    with pytest.raises(BadInput):
        load_family(str(published("sd1")))


@pytest.mark.parametrize(
    ("name", "family", "architectures"),
    [
        ("flux-dev", "flux", {"flux-1-dev": "flux-dev", "flux-1-schnell": "flux-schnell"}),
        (
            "sd3-medium",
            "sd3",
            {"stable-diffusion-3-medium": "sd3-medium", "stable-diffusion-3.5-medium": "sd3.5-medium"},
        ),
    ],
)
@pytest.mark.slow
def test_only_a_known_architecture_is_written(
    name: str, family: str, architectures: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of modules that two published models have alike: the header decides, or no label is written."""
    tensors = {key: value for key, value in kohya_file(published(name), 23).items() if "attn2" not in key}
    out = str(tmp_path / "new.safetensors")
    file = saved(tensors, tmp_path / "x.safetensors")
    for command in (["convert", str(file)], ["merge", f"{file}:0.5"], ["resize", str(file), "--rank", "1"]):
        assert run([*command, "--out", out, "--force"]) == (0, "")
        said = capsys.readouterr().out.splitlines()[0]
        assert (
            f"compared with the published {TITLES[name]} configuration, the first of those that the file fits" in said
        )
        assert "state no architecture" in said
        assert TITLES[list(architectures.values())[1]] in said
        with safe_open(out, "pt") as opened:
            assert "modelspec.architecture" not in opened.metadata()
            assert opened.metadata()["ss_base_model_version"].startswith(family)
    for architecture, chosen in architectures.items():
        told = saved(tensors, tmp_path / f"{chosen}.safetensors", {"modelspec.architecture": f"{architecture}/lora"})
        assert run(["convert", str(told), "--out", out, "--force"]) == (0, "")
        said = capsys.readouterr().out.splitlines()[0]
        assert f"the published {TITLES[chosen]} configuration; give --base" in said
        with safe_open(out, "pt") as opened:
            assert opened.metadata()["modelspec.architecture"] == f"{architecture.replace('.', '-')}/lora"
    decided = tmp_path / f"{name}.safetensors"
    assert run(["merge", str(file), str(decided), "--out", out, "--force"]) == (0, "")
    with safe_open(out, "pt") as opened:
        assert opened.metadata()["modelspec.architecture"] == f"{next(iter(architectures))}/lora"
