"""Recipes: the settings of all packages together, and how they are read, checked and written."""
