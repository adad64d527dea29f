"""PyTorch checkpoints in and out."""
