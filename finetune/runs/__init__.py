"""The run folder: its files, its records, its metrics and status."""
