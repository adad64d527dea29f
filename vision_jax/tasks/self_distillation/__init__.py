"""Images without labels: what a student learns from its own moving average."""
