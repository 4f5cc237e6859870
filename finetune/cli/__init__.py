"""The `finetune` command."""
