"""Prior preservation: keeps the base's knowledge of the class during training (the recipe's `prior:` section)."""
