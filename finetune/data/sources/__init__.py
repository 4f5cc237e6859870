"""Sources of photos and captions: one module for each kind of source."""
