"""From photos and captions to batches: scanning, crops, buckets, masks, caches, rare tokens."""
