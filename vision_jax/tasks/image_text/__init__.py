"""Images with captions: what a model learns from which text belongs to which image."""
