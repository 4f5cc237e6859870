"""Settings of other trainers, read into recipes."""
