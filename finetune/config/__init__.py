"""A recipe, composed of the settings of all packages: read, checked, written."""
