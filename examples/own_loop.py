"""Your own training loop with components of this package: a family, a method, an objective and export formats.

python examples/own_loop.py [PHOTOS]

`finetune train` adds checkpoints, caches, class images, several processes, and checks of the exports.
"""

import sys
from pathlib import Path

import torch

from finetune.core.batch import Batch
from finetune.core.rng import SampleKey
from finetune.data.crops import make_crops
from finetune.data.photos import scan
from finetune.export.adapter import adapter_from
from finetune.export.registry import EXPORTS
from finetune.families.source import load_family
from finetune.methods.lora import LoRA
from finetune.objectives.registry import build_objective
from finetune.objectives.settings import ObjectiveSettings
from finetune.sampling.draw import draw
from finetune.training.step import Step, parts_of

STEPS, PROMPT = 20, "a photo of zwx mug"

folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "subject_mug"
family = load_family("tiny")
method = LoRA(rank=8)
trained = method.attach(family, seed=0)
side = (family.resolution, family.resolution)
crops = [make_crops(photo, side, "center", 1, False, 0)[0] for photo in scan(folder)]
latents = [family.codec.encode(crop.pixels()[None]) for crop in crops]  # once: the VAE is frozen

step = Step(
    family, parts_of(trained), build_objective(ObjectiveSettings(), family.schedule), family.encode_prompts
).train()
optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
for number in range(STEPS):
    which = number % len(crops)
    # all randomness (noise, timestep and dropout of this sample) depends only on the key
    key, geometry = SampleKey(0, number, 0), crops[which].geometry
    loss = step(Batch(latents[which], [PROMPT], torch.ones(1), [geometry], [key], [crops[which].photo.path.name]))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {number + 1}: loss {loss.item():.4f}")

out = Path("own_loop")
out.mkdir(exist_ok=True)
export = EXPORTS[family.naming.ui_format]()
export.write(adapter_from(method, family), out / "mug.safetensors", torch.float16, {})
draw(family, [f"{PROMPT} on the beach"], seeds=[0])[0].save(out / "beach.png")
print(f"look at {out}/mug.safetensors and {out}/beach.png")
