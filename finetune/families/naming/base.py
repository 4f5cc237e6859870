"""What files of other programs call a family and its modules, and which programs are known to read which file.

Facts sit with the family: each fills in a `Naming`. They were read from the loaders' sources (docs/exports.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Labels:
    """What files of a family call it: kohya's `ss_base_model_version` and `ss_v2`, modelspec's architecture and
    implementation, and the "sd version" of Forge's sidecars. `v_*` for bases that predict v."""

    kohya: str
    architecture: str
    implementation: str
    sidecar: str
    prediction: str = "epsilon"  # "" for flows, which modelspec has no word for
    v_kohya: str = ""
    v_architecture: str = ""
    v2: bool = False


@dataclass(frozen=True)
class Readers:
    """The programs that are known to read a family's files, by format.

    `diffusers_format` holds for a LoRA of the denoiser alone; `with_texts` for one of text encoders too.
    `refuse_unknown`: programs that refuse a whole kohya file for one key that they do not know.
    """

    kohya: tuple[str, ...] = ()
    diffusers_format: tuple[str, ...] = ("diffusers",)
    with_texts: tuple[str, ...] = ("diffusers",)
    embedding: tuple[str, ...] = ()
    refuse_unknown: tuple[str, ...] = ()


ONLY_DIFFUSERS = Readers(kohya=("diffusers",), embedding=("diffusers",))


@dataclass(frozen=True)
class SingleFile:
    """A family's checkpoint in the original (LDM, SGM) layout.

    `texts`: text encoder -> (prefix in the file, whether it is in OpenCLIP's layout there). `like`: the hub id whose
    configs and tokenizers go with such a file.
    """

    texts: Mapping[str, tuple[str, bool]]
    like: str


@dataclass(frozen=True)
class Naming:
    """A family's names in files.

    Attributes:
        labels: what its files say of themselves.
        prefixes: part -> kohya's prefix ("lora_unet", "lora_te", ...): the parts that can be trained.
        readers: which programs read its files; None where that was not found out.
        single_file: its original checkpoint layout; None for none here.
        ui_format: the LoRA format that UIs read, which gets the plain file name.
        joined: several of our modules are one matrix in kohya's file, each with its own rank and alpha.
        scale_in_matrices: LoRA files in diffusers' names without an alpha have alpha = rank.
    """

    labels: Labels
    prefixes: Mapping[str, str]
    readers: Readers | None = field(default_factory=Readers)
    single_file: SingleFile | None = None
    ui_format: str = "kohya"
    joined: bool = False
    scale_in_matrices: bool = False

    @property
    def known_readers(self) -> Readers:
        return self.readers or ONLY_DIFFUSERS

    def original_names(self, paths: Sequence[str], config: Mapping[str, Any]) -> dict[str, list[str]]:
        """The denoiser's names in kohya's files, with dots -> the modules that one such matrix holds, by rows.

        Args:
            paths: the denoiser's modules.
            config: the denoiser's.
        """
        return {path: [path] for path in paths}

    def other_names(self, name: str, config: Mapping[str, Any]) -> list[str]:
        """What other trainers call the denoiser's matrix `name` (with dots, as `original_names` has it)."""
        return []
