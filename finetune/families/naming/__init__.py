"""The names that other programs give to a base model's weights."""
