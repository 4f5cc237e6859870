"""The names of a family and its modules in other programs' files, and the programs that are known to read each file.

Each family defines a `Naming`. Its facts come from the source code of the programs' loaders (docs/exports.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Labels:
    """The names of a family in file headers: kohya's `ss_base_model_version` and `ss_v2`, modelspec's architecture and
    implementation, and the "sd version" of Forge's sidecars. `v_*` apply to bases that predict v."""

    kohya: str
    architecture: str
    implementation: str
    sidecar: str
    prediction: str = "epsilon"  # "" for flows: modelspec has no value for them
    v_kohya: str = ""
    v_architecture: str = ""
    v2: bool = False


@dataclass(frozen=True)
class Readers:
    """The programs that are known to read a family's files, by format.

    `diffusers_format` is for a LoRA of the denoiser alone, `with_texts` for one that includes text encoders.
    `native` is for LoHa and LoKr in LyCORIS' format, `dora` for DoRA in it, at strength 1.
    `refuse_unknown`: programs that refuse a whole kohya file because of one unknown key.
    """

    kohya: tuple[str, ...] = ()
    diffusers_format: tuple[str, ...] = ("diffusers",)
    with_texts: tuple[str, ...] = ("diffusers",)
    embedding: tuple[str, ...] = ()
    native: tuple[str, ...] = ()
    dora: tuple[str, ...] = ()
    refuse_unknown: tuple[str, ...] = ()


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
        """The names of the denoiser's matrices in kohya's files, with dots -> the modules in that matrix, by rows.

        Args:
            paths: the module paths of the denoiser.
            config: the denoiser's config.
        """
        return {path: [path] for path in paths}

    def other_names(self, name: str, config: Mapping[str, Any]) -> list[str]:
        """The names that other trainers use for the denoiser's matrix `name` (with dots, from `original_names`)."""
        return []
