"""Images without labels: what a model learns from them alone."""
