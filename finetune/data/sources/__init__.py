"""Where photos and their captions come from: one file for each kind of place."""
