"""How training keeps what the base knows about the class: the kinds of a recipe's `prior:` section."""
