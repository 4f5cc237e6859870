"""The names of a base model's weights in other programs' files."""
