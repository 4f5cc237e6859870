"""Numbers for images that a subject's or a style's LoRA drew: each metric is one file in `metrics`, each network that
looks at images one file in `backbones`."""
