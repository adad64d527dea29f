"""Sources of images, decoding, grain pipelines."""
