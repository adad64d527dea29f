"""Images without labels: what makes two views of an image alike, and unlike those of others."""
