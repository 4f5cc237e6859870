"""Shared code of all PEFT adapters. Each kind defines its config, its parameters' names and its delta."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from pydantic import Field

from finetune.core.errors import BadInput
from finetune.families.naming.clip import strip_text_model
from finetune.methods.base import Method
from finetune.methods.start import ReferenceModel, adapted_layers, adapters_disabled, tuner_layers

if TYPE_CHECKING:
    from torch import Tensor, nn

    from finetune.families.base import Family

ADAPTER = "default"
CROSS_KV = ("attn2.to_k", "attn2.to_v")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # the names of PEFT's files
MOST_RANK = 4096  # more than any layer of the families can use
PREFIX = "base_model.model."
MAGNITUDE = ".lora_magnitude_vector"  # in PEFT's files, without the `.weight` of the parameter


class PeftAdapter(Method):
    """An adapter that PEFT adds to a frozen base.

    `targets` chooses the denoiser's layers: its attention projections (attention), all linear layers in its attention
    blocks (all-linear), also the convolutions of its residual blocks (conv), or only the keys and values of its cross
    attention (cross-kv; Custom Diffusion, arXiv:2212.04488). Text encoders are adapted at their attention and MLP
    projections.
    """

    marks: ClassVar[tuple[str, ...]]  # the names of its parameters contain one of these
    targets: Literal["attention", "all-linear", "conv", "cross-kv"] = "all-linear"

    @abstractmethod
    def config(self, targets: list[str]) -> Any:
        """The peft.PeftConfig for the modules of one part."""

    def delta(self, layer: Any) -> Tensor:
        """The change of one adapted layer's weight: same shape as the weight, float32."""
        delta: Tensor = layer.get_delta_weight(ADAPTER)
        return delta.float()

    def native_tensors(self, layer: Any) -> dict[str, Tensor]:
        """One adapted layer in LyCORIS' format, name -> tensor; empty for methods without the artifact "native"."""
        return {}

    def prepare(self, layer: Any) -> None:
        """Corrects a new layer if PEFT's initial values would change the base or would not be reproducible."""

    @property
    def is_adapter(self) -> bool:
        return True

    def target_modules(self, family: Family, part: str) -> list[str]:
        """Full paths of the adapted modules.

        Raises:
            BadInput: this family has no modules for `targets`.
        """
        if self.targets != "cross-kv" or part != "denoiser":
            return family.lora_targets(part, self.targets)
        found = [path for path in family.lora_targets(part, "attention") if path.endswith(CROSS_KV)]
        if not found:
            raise BadInput(
                f"method.targets is cross-kv but {family.name} has no separate cross attention: use attention"
            )
        return found

    def check_fits(self, family: Family) -> None:
        for part in self.part_names(family):
            self.target_modules(family, part)

    def attach(self, family: Family, seed: int) -> dict[str, nn.Parameter]:
        import peft
        import torch

        trained: dict[str, nn.Parameter] = {}
        for part in self.part_names(family):
            module, config = family.parts[part], self.config(self.target_modules(family, part))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                peft.inject_adapter_in_model(config, module, adapter_name=ADAPTER)
            for name, parameter in module.named_parameters():
                own = self._is_own(name)
                parameter.requires_grad_(own)
                if own:
                    parameter.data = parameter.data.float()
                    trained[f"{part}.{name}"] = parameter
        for _, _, layer in self.layers(family):
            self.prepare(layer)
        return trained

    def adapted_modules(self, family: Family) -> int:
        return sum(1 for _ in self.layers(family))

    def layers(self, family: Family) -> Iterator[tuple[str, str, Any]]:
        """(part, module path without `text_model.`, the adapted layer) of an attached family."""
        for part in self.part_names(family):
            for path, layer in tuner_layers(family.parts[part]):
                yield part, strip_text_model(path), layer

    def deltas(self, family: Family) -> Iterator[tuple[str, str, Tensor]]:
        """(part, module path, effective weight - base weight), one module at a time: together they are as large as the
        base."""
        import torch

        for part, path, layer in self.layers(family):
            with torch.no_grad():
                delta = self.delta(layer)
            yield part, path, delta

    def state_dict(self, family: Family) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self._parameters(family)}

    def load_state_dict(self, family: Family, state: dict[str, Tensor]) -> None:
        from finetune.core.fitting import copy_fitting

        own = dict(self._parameters(family))
        wrong = sorted(own.keys() ^ state.keys())
        if wrong:
            raise BadInput(
                f"the adapter does not fit the recipe: {len(wrong)} weights are missing or unknown, such as "
                f"{wrong[0]!r}: "
                "use the run's own recipe"
            )
        copy_fitting(own, state, "the adapter's weights")

    @contextmanager
    def disabled(self, family: Family) -> Iterator[None]:
        """Switches every adapter off inside the block, which leaves the unchanged base."""
        with self.base_of(family)():
            yield

    def base_of(self, family: Family) -> ReferenceModel:
        return adapters_disabled(family, adapted_layers(family, self.part_names(family)))

    def reference_bytes(self, family: Family) -> int:
        return 0

    def native_form(self, family: Family) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
        """Part -> (content of adapter_config.json, tensors of adapter_model.safetensors in fp32), in PEFT's format."""
        forms = {}
        for part in self.part_names(family):
            config = self.config([path for path, _ in tuner_layers(family.parts[part])])
            config.inference_mode = True
            plain = {key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()}
            tensors = {
                PREFIX + _without_adapter(name).replace(f"{MAGNITUDE}.weight", MAGNITUDE): value.detach()
                for name, value in family.parts[part].named_parameters()
                if self._is_own(name)
            }
            forms[part] = (plain, tensors)
        return forms

    def _is_own(self, name: str) -> bool:
        return any(mark in name for mark in self.marks)

    def _parameters(self, family: Family) -> Iterator[tuple[str, nn.Parameter]]:
        """("denoiser.<path>.lora_A.weight", parameter): PEFT's names without the adapter's."""
        for part in self.part_names(family):
            for name, parameter in family.parts[part].named_parameters():
                if self._is_own(name):
                    yield f"{part}.{_without_adapter(strip_text_model(name))}", parameter


class Ranked(PeftAdapter):
    """Adapters with a rank and the scale alpha / rank. `alpha: null` means alpha = rank, so that the scale is 1."""

    rank: int = Field(default=16, ge=1, le=MOST_RANK)
    alpha: float | None = Field(default=None, gt=0)

    @property
    def alpha_value(self) -> float:
        return float(self.rank if self.alpha is None else self.alpha)

    @property
    def scale(self) -> float:
        return self.alpha_value / self.rank

    @property
    def peft_alpha(self) -> int:
        """`alpha_value` for PEFT, whose annotations require int although it also accepts floats."""
        return cast(int, self.alpha_value)


def tensors_of(layer: Any) -> dict[str, Tensor]:
    """The trained tensors of a LoHa or LoKr layer by their names, which PEFT took from LyCORIS."""
    held = {name: getattr(layer, name) for name in layer.adapter_layer_names}
    return {name: tensors[ADAPTER].detach() for name, tensors in held.items() if ADAPTER in tensors}


def active_lora(module: nn.Module) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """(path without `text_model.`, A, B, scale) of the active LoRA layers, whichever program added them."""
    for path, layer in tuner_layers(module):
        if layer.disable_adapters:
            continue
        for name in layer.active_adapters:
            if name in getattr(layer, "lora_A", ()):
                scale = float(layer.scaling[name])
                yield strip_text_model(path), layer.lora_A[name].weight, layer.lora_B[name].weight, scale


def read_native_form(family: Family, folder: Path) -> None:
    """Loads a PEFT folder of any kind (PART/adapter_config.json, ...) into a clean family with PEFT's own reader.

    Raises:
        BadInput: its weights do not fit its config.
    """
    import peft
    from peft.tuners.tuners_utils import cast_adapter_dtype
    from peft.utils import set_peft_model_state_dict
    from safetensors.torch import load_file

    for file in sorted(folder.glob(f"*/{CONFIG}")):
        module = family.parts[file.parent.name]
        config = peft.PeftConfig.from_pretrained(str(file.parent))
        module.requires_grad_(False)
        peft.inject_adapter_in_model(config, module, adapter_name=ADAPTER)
        cast_adapter_dtype(module, ADAPTER)  # to fp32, as PeftModel.from_pretrained does
        tensors = {key.removeprefix(PREFIX): value for key, value in load_file(file.with_name(WEIGHTS)).items()}
        result: Any = set_peft_model_state_dict(module, tensors, adapter_name=ADAPTER)
        missing = [name for name in result.missing_keys if any(f".{kind}" in name for kind in _prefixes(module))]
        if missing or result.unexpected_keys:
            odd = [*missing, *result.unexpected_keys]
            raise BadInput(
                f"{file.parent} does not fit its config: {len(odd)} weights are missing or unknown, such as "
                f"{odd[0]!r}: "
                "export it again"
            )
        module.eval()


def _prefixes(module: nn.Module) -> set[str]:
    return {name for _, layer in tuner_layers(module) for name in layer.adapter_layer_names}


def _without_adapter(name: str) -> str:
    return name.replace(f".{ADAPTER}.", ".").removesuffix(f".{ADAPTER}")
