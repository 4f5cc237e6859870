"""What is trained and how it is attached to a base: LoRA and its relatives, full weights, new embeddings."""
