"""Full fine-tuning: the denoiser's and/or the text encoders' own weights, in fp32 or bf16."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from finetune.core.errors import BadInput
from finetune.methods.base import Method

if TYPE_CHECKING:
    from torch import Tensor, nn

    from finetune.families.base import Family


class Full(Method):
    """Trains every weight of the chosen parts, except those that the family never uses."""

    artifacts: ClassVar = ("weights",)
    shards: ClassVar = True
    holds_bf16: ClassVar = True
    kind: Literal["full"] = "full"

    @property
    def is_adapter(self) -> bool:
        return False

    def attach(self, family: Family, seed: int) -> dict[str, nn.Parameter]:
        trained = self._parameters(family)
        for parameter in trained.values():
            parameter.data = parameter.data.to(family.trained_dtype)
            parameter.requires_grad_(True)
        return trained

    def adapted_modules(self, family: Family) -> int:
        modules = [module for part in self.part_names(family) for module in family.parts[part].modules()]
        return sum(any(p.requires_grad for p in module.parameters(recurse=False)) for module in modules)

    def _parameters(self, family: Family) -> dict[str, nn.Parameter]:
        return {
            f"{part}.{name}": parameter
            for part in self.part_names(family)
            for name, parameter in family.parts[part].named_parameters()
            if not name.startswith(family.unused_parameters.get(part, ()))
        }

    def state_dict(self, family: Family) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self._parameters(family).items()}

    def load_state_dict(self, family: Family, state: dict[str, Tensor]) -> None:
        from finetune.core.fitting import copy_fitting

        own = self._parameters(family)
        wrong = sorted(own.keys() ^ state.keys())
        if wrong:
            raise BadInput(
                f"the weights do not fit the recipe: {len(wrong)} names are missing or unknown, such as {wrong[0]!r}: "
                "use the run's own recipe"
            )
        copy_fitting(own, state)
