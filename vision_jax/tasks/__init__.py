"""What a task is: batch layout, loss, metrics, predictions."""
