"""The readers for loaders.py: each runs a program's own code on a file."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import subprocess
import sys
import types
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from loaders_cases import Case, Deltas, modules_of
from safetensors.torch import load_file
from torch import Tensor, nn

from finetune.export.lora.kohya import places
from finetune.export.lora.lycoris import module_names
from finetune.export.lora.peft import Peft
from finetune.families.base import Family
from finetune.families.naming.clip import strip_text_model
from finetune.families.naming.ldm import unet_name
from finetune.families.naming.single_file import pack
from finetune.methods.peft_adapter import CONFIG
from finetune.methods.start import tuner_layers


class Reader(ABC):
    """A program that reads LoRA files."""

    name: str

    @property
    @abstractmethod
    def version(self) -> str:
        """Its version or commit."""

    def reads(self, case: Case) -> bool:
        """Whether the file is meant for it."""
        return case.form != Peft.name

    @abstractmethod
    def deltas(self, case: Case) -> Deltas:
        """The changes that it makes to a clean base with the file; raises what the program raises."""


def merged(family: Family, parts: list[str]) -> Deltas:
    """The changes that PEFT's layers, whoever added them, make when they merge."""
    found = {}
    for part in parts:
        for path, layer in tuner_layers(family.parts[part]):
            weight = layer.get_base_layer().weight
            before = weight.detach().double().clone()
            weight.data = weight.data.double()
            layer.merge()
            found[part, strip_text_model(path)] = (weight.detach() - before).float()
    return found


class DiffusersReader(Reader):
    name = "diffusers"
    version = diffusers.__version__

    def reads(self, case: Case) -> bool:
        """Not Flux's joined form: its converter knows only Flux's own widths (tests/export has that at full size)."""
        return super().reads(case) and (case.base.model, case.form) != ("Flux.1 dev", "kohya")

    def deltas(self, case: Case) -> Deltas:
        family = case.base.family()
        kind = getattr(diffusers, family.pipeline_class)
        names = {
            source.folder: family.parts[part] for part, source in family.sources.items() if part in adapted(family)
        }
        others = set(kind.__init__.__annotations__) - names.keys() - {"return"}
        flags = {"requires_safety_checker", "force_zeros_for_empty_prompt", "is_unet_version_gt_1", "add_watermarker"}
        pipeline = kind(**names, **{name: None for name in others - flags if name in needed(kind)})
        pipeline.load_lora_weights(str(case.path.parent), weight_name=case.path.name)
        return merged(family, adapted(family))


def adapted(family: Family) -> list[str]:
    return ["denoiser", *family.trainable_text_encoders]


def needed(kind: Any) -> set[str]:
    """The arguments of a pipeline that have no default."""
    given = inspect.signature(kind.__init__).parameters.values()
    return {item.name for item in given if item.default is item.empty and item.name not in ("self", "kwargs")}


class PeftReader(Reader):
    name = "peft"
    version = importlib.metadata.version("peft")

    def reads(self, case: Case) -> bool:
        return case.form == Peft.name

    def deltas(self, case: Case) -> Deltas:
        import peft

        family, found = case.base.family(), []
        for file in case.path.glob(f"*/{CONFIG}"):
            found.append(file.parent.name)
            peft.PeftModel.from_pretrained(family.parts[file.parent.name], file.parent)
        return merged(family, found)


class LycorisReader(Reader):
    """The package lycoris-lora. In its DoRA, the norm is that of W + B A, where ComfyUI and Forge have that of W."""

    name = "lycoris"

    @property
    def version(self) -> str:
        return importlib.metadata.version("lycoris-lora")

    def reads(self, case: Case) -> bool:
        return case.form in ("lycoris", "kohya") and not case.base.family().naming.joined

    def deltas(self, case: Case) -> Deltas:
        modules = importlib.import_module("lycoris.modules")
        modules_here, tensors = modules_of(case.base.family()), load_file(case.path)
        found = {}
        for place, name in module_names(case.base.folder).items():
            kind, params = modules.get_module(tensors, name)
            if kind is not None:
                layer = modules_here[place]
                made = modules.make_module(kind, params, name, layer)
                change = made.get_weight(layer.weight.shape) if case.kind in ("loha", "lokr") else None
                weight = layer.weight.detach().clone()
                if change is None:
                    change = made.get_merged_weight(shape=layer.weight.shape)[0] - weight
                found[place] = change.detach().reshape(weight.shape)
        return found


class Sources(Reader):
    """A program from a folder with its sources."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        sys.path.append(str(folder))

    @property
    def version(self) -> str:
        command = ["git", "-C", str(self.folder), "rev-parse", "--short", "HEAD"]
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        return found or "unknown"


class InvokeAI(Sources):
    """Its conversion and layers. Importing the whole program needs its GPU packages, so the start-up code of its
    packages is passed over, and modules are found in a table of their names."""

    name = "InvokeAI"

    def reads(self, case: Case) -> bool:
        """Not SD3, for which its source has no loader, nor Flux in diffusers' names: that converter knows only Flux's
        own widths."""
        known = case.base.model != "SD3.5 medium" and (case.base.model, case.form) != ("Flux.1 dev", "diffusers")
        return super().reads(case) and known

    @cached_property
    def code(self) -> dict[str, Any]:
        root = self.folder / "invokeai"
        for name in ("model_manager", "model_manager.load", "model_manager.load.model_cache"):
            package = types.ModuleType(f"invokeai.backend.{name}")
            package.__path__ = [str(root / "backend" / name.replace(".", "/"))]
            sys.modules[package.__name__] = package
        at = "invokeai.backend.patches.lora_conversions"
        names = ("sd", "sdxl", "flux_kohya", "flux_diffusers")
        held = {name: importlib.import_module(f"{at}.{name}_lora_conversion_utils") for name in names}
        return held | {"formats": importlib.import_module(f"{at}.formats")}

    @property
    def version(self) -> str:
        about = next(self.folder.glob("[iI]nvoke[aA][iI]-*.dist-info/METADATA"), None)
        if about is None:
            return super().version
        return next(
            line.split()[1] for line in about.read_text(encoding="utf-8").splitlines() if line.startswith("Version:")
        )

    def deltas(self, case: Case) -> Deltas:
        family = case.base.family()
        here, table = modules_of(family), self._modules(family, case.base.folder)
        found = {}
        for key, layer in self._layers(family.name, load_file(case.path)).items():
            if key not in table:
                continue
            part, modules = table[key]
            weights = [here[part, module].weight.detach() for module in modules]
            change = layer.get_parameters({"weight": torch.cat(weights)}, 1.0)["weight"]
            for module, value in zip(modules, change.split([len(weight) for weight in weights]), strict=True):
                found[part, module] = value
        return {place: value for place, value in found.items() if bool(value.any())}

    def _layers(self, family: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        code = self.code
        if family in ("sd1", "sd2"):
            return dict(code["sd"].lora_model_from_sd_state_dict(tensors).layers)
        if family == "sdxl":
            return dict(
                code["sd"]
                .lora_model_from_sd_state_dict(code["sdxl"].convert_sdxl_keys_to_diffusers_format(tensors))
                .layers
            )
        form = code["formats"].flux_format_from_state_dict(tensors) if family == "flux" else None
        if form is None or form.name not in ("Kohya", "Diffusers"):
            raise ValueError(f"it has no loader for this file of {family}")
        if form.name == "Kohya":
            return dict(code["flux_kohya"].lora_model_from_flux_kohya_state_dict(tensors).layers)
        return dict(code["flux_diffusers"].lora_model_from_flux_diffusers_state_dict(tensors, alpha=None).layers)

    def _modules(self, family: Family, folder: Path) -> dict[str, tuple[str, tuple[str, ...]]]:
        """Its name of a layer -> (part, the modules that share it)."""
        if family.name == "flux":
            names = {"denoiser": "lora_transformer-", "text_encoder": "lora_clip-text_model."}
            return {f"{names[part]}{path}": (part, place.modules) for (part, path), place in places(folder).items()}
        table: dict[str, tuple[str, tuple[str, ...]]] = {}
        for part, prefix in family.naming.prefixes.items():
            level = "text_model_" if part.startswith("text_encoder") else ""
            for path, _ in family.parts[part].named_modules():
                plain = strip_text_model(path)
                table[f"{prefix}_{level}{plain.replace('.', '_')}"] = (part, (plain,))
        return table


class ComfyUI(Sources):
    """Its key map, loader and calculator, on a stand-in that has the weights of its model."""

    name = "ComfyUI"

    def deltas(self, case: Case) -> Deltas:
        importlib.import_module("comfy.cli_args").args.cpu = True
        lora, family = importlib.import_module("comfy.lora"), case.base.family()
        here, table = modules_of(family), self._weights(family, case.base.folder)
        weights = {key: torch.cat([here[part, m].weight.detach() for m in ms]) for key, (part, ms) in table.items()}
        keys = lora.model_lora_keys_clip(self._clip(weights), {})
        keys = lora.model_lora_keys_unet(self._model(family, weights), keys)
        changed = {key: value.clone() for key, value in weights.items()}
        for target, patch in lora.load_lora(load_file(case.path), keys).items():
            key, offset = (target, None) if isinstance(target, str) else (target[0], target[1])
            changed[key] = lora.calculate_weight([(1.0, patch, 1.0, offset, None)], changed[key], key)
        found = {}
        for key, (part, modules) in table.items():
            sizes = [len(here[part, module].weight) for module in modules]
            for module, value in zip(modules, (changed[key] - weights[key]).split(sizes), strict=True):
                found[part, module] = value
        return {place: value for place, value in found.items() if bool(value.any())}

    def _weights(self, family: Family, folder: Path) -> dict[str, tuple[str, tuple[str, ...]]]:
        """Its name of a weight -> (part, the modules whose rows it joins)."""
        clip = {"text_encoder": "clip_h" if family.name == "sd2" else "clip_l", "text_encoder_2": "clip_g"}
        config, table = dict(cast(Any, family.parts["denoiser"]).config), {}
        for (part, name), place in places(folder).items():
            if part in clip:
                table[f"{clip[part]}.transformer.text_model.{name}.weight"] = (part, place.modules)
            elif part == "denoiser":
                other = unet_name(place.modules[0], config) if family.naming.single_file else name
                table[f"diffusion_model.{other}.weight"] = (part, place.modules)
        return table

    def _clip(self, weights: dict[str, Tensor]) -> Any:
        return types.SimpleNamespace(state_dict=lambda: {k: v for k, v in weights.items() if k.startswith("clip_")})

    def _model(self, family: Family, weights: dict[str, Tensor]) -> Any:
        base = importlib.import_module("comfy.model_base")
        kind: Any = {"flux": base.Flux, "sd3": base.SD3, "sdxl": base.SDXL}.get(family.name, base.BaseModel)
        model = kind.__new__(kind)
        nn.Module.__init__(model)
        config = dict(cast(Any, family.parts["denoiser"]).config)
        if family.naming.single_file is None:
            sizes = {"depth": config["num_layers"], "depth_single_blocks": config.get("num_single_layers", 0)}
            settings = sizes | {"hidden_size": 32}
        else:
            held = pack(family.naming.single_file, {"denoiser": family.parts["denoiser"]}, torch.float32)
            detect = importlib.import_module("comfy.model_detection").detect_unet_config
            settings = detect(held, "model.diffusion_model.")
        model.model_config = types.SimpleNamespace(unet_config=settings)
        model.state_dict = lambda: {k: v for k, v in weights.items() if k.startswith("diffusion_model.")}
        return model


UIS = {"comfyui": ComfyUI, "invokeai": InvokeAI}
