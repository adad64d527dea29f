"""RegNets' widths, depths and groups by the paper."""

from vision_jax.models.regnet import variant


def test_stages_from_the_papers_numbers():
    """Table 8 and 9 of the paper; torchvision rounds a width down only if that keeps 90 %."""
    assert variant("regnety_040") == {
        "depths": (2, 6, 12, 2),
        "widths": (128, 192, 512, 1088),
        "group_widths": (64,) * 4,
        "se_ratio": 0.25,
    }
    assert variant("regnetx_004")["widths"] == (32, 64, 160, 384)
    assert variant("regnetx_004_tv")["widths"] == (32, 64, 160, 400)
    assert variant("regnetz_004") is None
