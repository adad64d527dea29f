"""What configs of small detectors share that learn from nothing on generated images."""

from ml_collections import ConfigDict


def learn_composites(config: ConfigDict, *, steps: int, lr: float, jitter: float) -> ConfigDict:
    """Garments pasted on aerial tiles of 64 pixels, which say nothing about photographs.

    Args:
      config: of a detector; changed, and returned.
      steps: updates.
      lr: their rate.
      jitter: share by which brightness, contrast and saturation vary.
    """
    config.batch_size = 16
    config.total_steps = steps
    config.model.image_size = 64
    config.optim.lr = lr
    config.optim.ema_decay = 0.998
    config.optim.clip_norm = 10.0
    config.data.train = "composites:train/0/4000"
    config.data.eval = "composites:test/0/300"
    config.data.max_boxes = 8
    config.data.crop = 0.0
    config.data.brightness = config.data.contrast = config.data.saturation = jitter
    config.evaluate.every = steps // 2
    config.evaluate.batch_size = 50
    config.robustness.images = 300
    config.robustness.batch_size = 50
    return config
