"""A trained generator at work: images made of noise, and how good they are."""
