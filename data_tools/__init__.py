"""Tools that turn photos into a training folder: `python -m data_tools check PHOTOS`."""
