"""Extra inputs of inpainting, depth and editing bases."""
