"""The Inception v3 of the FID: torchvision's, with pytorch-fid's blocks, and no weights."""

import torchvision
from pytorch_fid import inception as blocks
from torch import nn

CLASSES = 1008


def build() -> nn.Module:
    """The module whose file pytorch-fid, torch-fidelity and torchmetrics read, at random."""
    module = torchvision.models.inception_v3(
        weights=None,
        num_classes=CLASSES,
        aux_logits=False,
        transform_input=False,
        init_weights=False,
    )
    module.Mixed_5b = blocks.FIDInceptionA(192, pool_features=32)
    module.Mixed_5c = blocks.FIDInceptionA(256, pool_features=64)
    module.Mixed_5d = blocks.FIDInceptionA(288, pool_features=64)
    module.Mixed_6b = blocks.FIDInceptionC(768, channels_7x7=128)
    module.Mixed_6c = blocks.FIDInceptionC(768, channels_7x7=160)
    module.Mixed_6d = blocks.FIDInceptionC(768, channels_7x7=160)
    module.Mixed_6e = blocks.FIDInceptionC(768, channels_7x7=192)
    module.Mixed_7b = blocks.FIDInceptionE_1(1280)
    module.Mixed_7c = blocks.FIDInceptionE_2(2048)
    return module
