"""The names of a family and its modules in other programs' files, and what each program does with such a file.

Each family defines a `Naming`. Where its facts come from is in docs/exports.md; a test compares its tables with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Labels:
    """The names of a family in file headers: kohya's `ss_base_model_version` and `ss_v2`, modelspec's architecture and
    implementation, and the "sd version" of Forge's sidecars. `v_*` apply to bases that predict v. `network` is kohya's
    `ss_network_module`."""

    kohya: str
    architecture: str
    implementation: str
    sidecar: str
    prediction: str = "epsilon"  # "" for flows: modelspec has no value for them
    v_kohya: str = ""
    v_architecture: str = ""
    v2: bool = False
    network: str = "networks.lora"


Verdict = tuple[str, str]  # "fully", "partly", "refused", "nothing", "unknown" or another state; the reason, if any
PROGRAMS = ("ComfyUI", "Forge", "A1111", "InvokeAI", "sdnext", "diffusers")
UNKNOWN: Verdict = ("unknown", "")
LYCORIS = "lycoris-lora"  # the package LyCORIS, a program only for files in its own format
# forms that share another's facts, as far as they have none of their own
LIKE = {"kohya_with_texts": "kohya", "loha": "native", "lokr": "native"}


@dataclass(frozen=True)
class Readers:
    """The programs that are known to read all of a family's files, by form.

    `kohya` and `diffusers_format` are for a LoRA of the denoiser alone, `kohya_with_texts` (None: as `kohya`) and
    `with_texts` for one that includes text encoders. `refuse_unknown`: programs that refuse a whole kohya file because
    of one unknown key. `others`: form -> program -> what it does instead, if that is known. `native` is for LoHa
    and LoKr in LyCORIS' format (forms "loha" and "lokr"), `dora` for DoRA in it, at strength 1.
    """

    kohya: tuple[str, ...] = ()
    kohya_with_texts: tuple[str, ...] | None = None
    diffusers_format: tuple[str, ...] = ("diffusers",)
    with_texts: tuple[str, ...] = ("diffusers",)
    embedding: tuple[str, ...] = ()
    native: tuple[str, ...] = ()
    dora: tuple[str, ...] = ()
    refuse_unknown: tuple[str, ...] = ()
    others: Mapping[str, Mapping[str, Verdict]] = field(default_factory=dict)

    def of(self, form: str) -> tuple[str, ...]:
        """The programs that read all of a file of this form (a field above, "loha" or "lokr")."""
        found: tuple[str, ...] | None = getattr(self, form, None)
        return self.of(LIKE[form]) if found is None else found

    def verdict(self, form: str, program: str) -> Verdict:
        """What a program does with a file of this form."""
        if program in self.of(form):
            return "fully", ""
        held = self.others.get(form)
        if held is None and form in LIKE:
            held = self.others.get(LIKE[form])
        return (held or {}).get(program, UNKNOWN)

    def limits(self, form: str) -> list[str]:
        """A line for each program that is known not to read all of a file of this form."""
        found = {program: self.verdict(form, program) for program in (*PROGRAMS, LYCORIS)}
        return [
            f"{program}: {state}{f', {why}' if why else ''}"
            for program, (state, why) in found.items()
            if state not in ("fully", "unknown")
        ]

    @property
    def cost_of_texts(self) -> list[str]:
        """A line for each program that reads a file of the denoiser alone, but not one with text encoders."""
        lines = []
        for plain, full, called in (
            ("kohya", "kohya_with_texts", ""),
            ("diffusers_format", "with_texts", " (diffusers file)"),
        ):
            lost = {name: self.verdict(full, name) for name in self.of(plain) if name not in self.of(full)}
            lines += [f"{program} {why}{called}" for program, (_, why) in lost.items() if why]
        return lines


ONLY_DIFFUSERS = Readers(kohya=("diffusers",), embedding=("diffusers",))


@dataclass(frozen=True)
class SingleFile:
    """A family's checkpoint in the original (LDM, SGM) layout.

    `texts`: text encoder -> (prefix in the file, whether the file uses OpenCLIP's layout for it). `like`: the hub id
    with the configs and tokenizers for such a file. `marked`: whether UIs know a base that predicts v only by empty
    tensors `v_pred` and `ztsnr` in it.
    """

    texts: Mapping[str, tuple[str, bool]]
    like: str
    marked: bool = False


@dataclass(frozen=True)
class Naming:
    """A family's names in files.

    Attributes:
        labels: its names in file headers.
        prefixes: part -> kohya's prefix ("lora_unet", "lora_te", ...), for the parts that can be trained.
        readers: the programs that read its files; None if unknown.
        single_file: its original checkpoint layout; None if it is not supported.
        ui_format: the LoRA format that UIs read; its file gets the plain name.
        joined: whether kohya's file joins several modules into one matrix, each with its own rank and alpha.
        scale_in_matrices: whether diffusers LoRA files without an alpha have alpha = rank.
        architecture_of: the denoiser's config -> modelspec's architecture; None: that of the labels.
    """

    labels: Labels
    prefixes: Mapping[str, str]
    readers: Readers | None = field(default_factory=Readers)
    single_file: SingleFile | None = None
    ui_format: str = "kohya"
    joined: bool = False
    scale_in_matrices: bool = False
    architecture_of: Callable[[Mapping[str, Any]], str] | None = None

    @property
    def known_readers(self) -> Readers:
        return self.readers or ONLY_DIFFUSERS

    def original_names(self, paths: Sequence[str], config: Mapping[str, Any]) -> dict[str, list[str]]:
        """The names of the denoiser's matrices in kohya's files, with dots -> the modules in that matrix, by rows.

        Args:
            paths: the module paths of the denoiser.
            config: the denoiser's config.
        """
        return {path: [path] for path in paths}

    def other_names(self, name: str, config: Mapping[str, Any]) -> list[str]:
        """The names that other trainers use for the denoiser's matrix `name` (with dots, from `original_names`)."""
        return []
