"""The Python API: loads a recipe, trains, and draws images.

python examples/train_api.py [PHOTOS] [section.key=value ...]
"""

import sys
from pathlib import Path

from finetune import Sampling, draw, load_recipe, open_result, train
from finetune.sampling.images import grid

photos = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "subject_mug"
recipe = load_recipe("demo", [f"data.photos={photos}", "data.class_noun=mug", "run.name=api", *sys.argv[2:]])
run = train(recipe)

family, info = open_result(run)
prompt = f"a photo of {info.trigger} on the beach"
grid(draw(family, [prompt] * 4, Sampling(guidance=3.0), seeds=range(4)), 4, [prompt]).save(run / "beach.png")
print(f"look at {run}/report.html and {run}/beach.png")
