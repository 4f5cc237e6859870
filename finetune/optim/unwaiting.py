"""bitsandbytes' optimisers without their wait for the device after each weight."""

from __future__ import annotations

from typing import Any


def unwaiting(kind: Any) -> Any:
    """The class `kind` of bitsandbytes with a `step` that does not make the CPU wait.

    bitsandbytes synchronises the device after every weight, hundreds of times in a step. Kernels of one stream run in
    their order without it, and only a paged state, which the CPU's memory holds, needs it.
    """
    import torch
    from bitsandbytes.optim import optimizer as module

    class Unwaiting(kind):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            wait, module.sync_gpu = module.sync_gpu, lambda weight: None
            try:
                return super().step(closure)
            finally:
                module.sync_gpu = wait

    return Unwaiting
