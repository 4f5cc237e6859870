"""What is said of other programs: docs/exports.md, the facts in the code, and what exports print agree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_export import ABOUT, bench_of, trained
from test_peft_kinds import SETTINGS, attached

from finetune.export.adapter import adapter_from, export_adapter
from finetune.export.base import Exported, Request
from finetune.export.lora.lycoris import Lycoris
from finetune.export.native import export_native
from finetune.families.naming.base import LYCORIS, PROGRAMS, Readers
from finetune.families.registry import FAMILIES

PAGE = Path(__file__).parents[2] / "docs" / "exports.md"
KOHYA, BOTH_KOHYA = ["kohya"], ["kohya", "kohya_with_texts"]
DIFFUSERS, BOTH_DIFFUSERS = ["diffusers_format"], ["diffusers_format", "with_texts"]
# heading above a table -> row -> the families and forms that it speaks of
ROWS = {
    "**kohya files (`NAME.safetensors`)**": {
        "SD1, SD2 (`lora_te_`)": (["sd1", "sd2"], BOTH_KOHYA),
        "SDXL (`lora_te1_`, `lora_te2_`)": (["sdxl"], BOTH_KOHYA),
        "SDXL refiner (`lora_te2_`)": (["sdxl-refiner"], BOTH_KOHYA),
        "Flux": (["flux"], KOHYA),
        "Flux with CLIP": (["flux"], ["kohya_with_texts"]),
        "SD3": (["sd3"], BOTH_KOHYA),
    },
    "**diffusers files (`NAME-diffusers/`)**": {
        "SD1, SD2": (["sd1", "sd2"], BOTH_DIFFUSERS),
        "SDXL": (["sdxl"], BOTH_DIFFUSERS),
        "SDXL refiner": (["sdxl-refiner"], BOTH_DIFFUSERS),
        "Flux": (["flux"], DIFFUSERS),
        "Flux with CLIP": (["flux"], ["with_texts"]),
        "SD3": (["sd3"], DIFFUSERS),
        "SD3 with CLIPs": (["sd3"], ["with_texts"]),
    },
    "## New words": {
        "SD1, SD2 (`emb_params`)": (["sd1", "sd2"], ["embedding"]),
        "SDXL (`clip_l`, `clip_g`)": (["sdxl"], ["embedding"]),
        "Flux (`clip_l`)": (["flux"], ["embedding"]),
        "SD3 (`clip_l`, `clip_g`)": (["sd3"], ["embedding"]),
    },
    "### The exact forms": {
        "LoHa (SD1, SD2, SDXL)": (["sd1", "sd2", "sdxl"], ["loha"]),
        "LoKr (SD1, SD2, SDXL)": (["sd1", "sd2", "sdxl"], ["lokr"]),
        "DoRA (SD1, SD2, SDXL), at strength 1": (["sd1", "sd2", "sdxl"], ["dora"]),
        "Flux": (["flux"], ["loha", "lokr", "dora"]),
        "SD3": (["sd3"], ["loha", "lokr", "dora"]),
    },
}


def table(heading: str) -> list[list[str]]:
    """The first table below a line of the page: its rows as cells, the head first."""
    lines = PAGE.read_text(encoding="utf-8").split(f"\n{heading}\n", 1)[1].splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [rows[0], *rows[2:]]


@pytest.mark.parametrize("heading", ROWS)
def test_the_page_says_what_the_code_says(heading: str) -> None:
    head, *rows = table(heading)
    programs = head[1:-1]
    assert tuple(programs) in (PROGRAMS, (*PROGRAMS, LYCORIS))
    assert [row[0] for row in rows] == list(ROWS[heading])
    for name, *cells, _ in rows:
        families, forms = ROWS[heading][name]
        for family in families:
            for form in forms:
                readers = FAMILIES[family].naming.known_readers
                told = [": ".join(text for text in readers.verdict(form, program) if text) for program in programs]
                assert cells == told, (name, form)


def test_every_row_says_how_it_is_known() -> None:
    for heading in [*ROWS, "**Other files**"]:
        head, *rows = table(heading)
        assert head[-1] == "how it is known"
        for row in rows:
            assert len(row) == len(head)
            assert re.match(r"(run|tests|source|as above)\b", row[-1]), row
            known = [cell for cell in row[1:6] if cell != "unknown"]
            assert not known or "run" in row[-1] or "source" in row[-1] or "as above" in row[-1], row


def test_a_form_with_texts_has_its_own_facts() -> None:
    readers = Readers(kohya=("A1111", "Forge"), others={"kohya": {"sdnext": ("nothing", "x")}})
    assert readers.of("kohya_with_texts") == ("A1111", "Forge")
    assert readers.verdict("kohya_with_texts", "sdnext") == ("nothing", "x")
    assert readers.verdict("with_texts", "sdnext") == ("unknown", "")
    assert readers.limits("kohya") == ["sdnext: nothing, x"]


@pytest.fixture
def exported(request: pytest.FixtureRequest, tiny_bases: dict[str, Path], tmp_path: Path) -> dict[str, Exported]:
    """The kohya and diffusers files of a Flux LoRA that trains these parts."""
    adapter = adapter_from(*trained(tiny_bases["flux"], parts=request.param, targets="attention"))
    items = export_adapter(
        adapter, Request(tmp_path, "x", "fp32", ABOUT), ["kohya", "diffusers"], bench_of(adapter.base_folder)
    )
    assert all(item.ok for item in items)
    return {item.format: item for item in items}


@pytest.mark.parametrize("exported", [["denoiser"]], indirect=True)
def test_flux_without_clip(exported: dict[str, Exported]) -> None:
    assert exported["kohya"].read_by == ["ComfyUI", "Forge", "InvokeAI", "sdnext"]
    assert "sdnext" not in exported["diffusers"].read_by


@pytest.mark.parametrize("exported", [["denoiser", "text_encoders"]], indirect=True)
def test_flux_with_clip_says_what_it_costs(exported: dict[str, Exported]) -> None:
    assert exported["kohya"].read_by == ["ComfyUI", "Forge", "InvokeAI"]
    assert "sdnext: refused, drops the whole file" in exported["kohya"].limits
    assert "InvokeAI: refused, raises when it draws" in exported["diffusers"].limits


def test_a_dora_file_names_who_does_not_read_it(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    method, family = attached(tiny_bases["sd1"], "dora", parts=["denoiser"], **SETTINGS["dora"])
    item = export_native(Lycoris(), method, family, Request(tmp_path, "x", "fp16", ABOUT))
    assert item.read_by == ["ComfyUI", "Forge"]
    assert [line.partition(": ")[0] for line in item.limits] == [*PROGRAMS[2:], LYCORIS]
    assert all(line.partition(": ")[2].startswith("wrongly, ") for line in item.limits)
    assert "diffusers: wrongly, it drops dora_scale" in item.limits


def test_a_lokr_file_is_refused_by_what_needs_its_alpha() -> None:
    limits = FAMILIES["sdxl"].naming.known_readers.limits("lokr")
    assert limits == ["diffusers: refused", f"{LYCORIS}: refused, fails where there is no alpha"]
    assert FAMILIES["sdxl"].naming.known_readers.limits("loha") == ["diffusers: refused"]
