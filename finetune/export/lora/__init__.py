"""LoRA file formats. One file for each format."""
