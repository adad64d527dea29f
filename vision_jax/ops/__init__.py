"""Pure functions of arrays: losses, augmentation, boxes, evaluation."""
