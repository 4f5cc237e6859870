"""Exports: writes the training result as files that other programs read, then reads each file back and compares it."""
