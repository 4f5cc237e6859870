"""Training methods: LoRA and related adapters, full weights, and embeddings of new words."""
