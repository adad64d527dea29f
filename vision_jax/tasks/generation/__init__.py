"""Generation: images from noise, by flow matching."""
