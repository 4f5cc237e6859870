"""What was trained, as files that other programs read; each file is opened again and compared."""
