"""The run folder: its files, records, metrics and status."""
