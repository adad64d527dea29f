"""Attacks on images: pure functions inside jit, (loss_of_images, images, keys, ...) -> images.

One convention carries all of them:

- Images are f[B, H, W, C] in [0, 1]; epsilons and step sizes are in that unit and may be traced.
- `loss_of_images(images) -> (loss f[B], fooled bool[B])`. Every attack maximizes the loss. Only
  images are differentiated, and an example's loss depends on its own image alone.
- `keys` are key[B], one an example. Derive them from the example, not from its place in a batch:
  `examples.keys_of(jax.random.key(seed), index)`. Then results depend on no batch size, order or
  number of devices.
"""
