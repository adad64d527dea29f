"""Inception v3 against torchvision, pytorch-fid and torch-fidelity; the FID against both latter."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import torch

import vision_jax
from vision_jax.certify.measure import certify_reference, relative_error
from vision_jax.certify.random_weights import randomize, randomize_statistics
from vision_jax.certify.references import make_reference
from vision_jax.convert.load import load_model
from vision_jax.generate import measures
from vision_jax.ops import fidelity
from vision_jax.ops.resize import resize_from_corner
from vision_jax.trees.paths import flatten

PLAIN = {"aux_logits": False, "transform_input": False, "init_weights": False}
REFERENCES = {"torchvision": ("inception_v3", PLAIN), "fid": ("fid", {})}
SIZE = (91, 107)


def reference_of(source, seed=0):
    build, arguments = REFERENCES[source]
    reference = make_reference(source, build, arguments)
    randomize(reference.module, seed)
    randomize_statistics(reference, SIZE, 3, seed)
    return reference


@pytest.mark.parametrize("source", REFERENCES)
def test_everything_equals_the_reference_and_goes_back(source):
    """Of one draw of weights, as other families': in float32 48 layers lose up to the whole bar."""
    certificate = certify_reference(reference_of(source, 3), SIZE, seed=3, whole=True)
    print(source, certificate["worst"])
    assert certificate["pass"], (certificate["reasons"], certificate["errors"])
    assert certificate["family"] == "inception"
    assert certificate["arguments"].get("fid", False) == (source == "fid")
    assert certificate["tensors_consumed"] == certificate["tensors"]
    assert {"conv_1a", "mixed_5b", "mixed_7c", "pooled", "logits"} <= set(
        certificate["errors"]["float64"]
    )


def test_a_file_without_its_counts_is_read(tmp_path, request):
    """As the published one has it: no number of updates, and a pickle."""
    reference = reference_of("fid", request.config.option.seed)
    state = {k: v for k, v in reference.module.state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "pt_inception-2015-12-05-6726825d.pth")
    model, variables = load_model(
        str(tmp_path / "pt_inception-2015-12-05-6726825d.pth"), allow_pickle=True
    )
    assert (model.fid, model.num_classes, model.mean) == (True, 1008, (128 / 255,) * 3)
    kernel = flatten(variables["params"])["mixed_7c/branch3x3_2a/conv/kernel"]
    theirs = state["Mixed_7c.branch3x3_2a.conv.weight"].numpy().transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(kernel, theirs)


def test_features_are_torch_fidelitys(tmp_path, request):
    """From whole pixels of any size to the 2,048 numbers, its resizing included."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    seed = request.config.option.seed
    reference = reference_of("fid", seed)
    torch.save(reference.module.state_dict(), tmp_path / "weights.pth")
    theirs = FeatureExtractorInceptionV3(
        "fid", ["2048"], feature_extractor_weights_path=str(tmp_path / "weights.pth")
    )
    loaded = vision_jax.load(tmp_path / "weights.pth", allow_pickle=True)
    images = np.random.default_rng(seed).integers(0, 256, (3, 37, 64, 3), np.uint8)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))[0].numpy()
    found = measures.make_features(loaded, lambda batch: np.stack(batch) / np.float32(255))(images)
    assert measures.is_inception(loaded)
    assert measures.distance_name(loaded, "6726825d" + 56 * "0") == "fid"
    assert measures.distance_name(loaded, 64 * "0") == "frechet"  # other weights are no FID's
    assert relative_error(found, expected) <= 1e-5


@pytest.mark.parametrize("shape", [(19, 32), (299, 299), (512, 300)])
def test_images_are_resized_as_by_tensorflow(shape, request):
    from torch_fidelity.interpolate_compat_tensorflow import (
        interpolate_bilinear_2d_like_tensorflow1x,
    )

    images = np.random.default_rng(request.config.option.seed).uniform(0, 255, (2, *shape, 3))
    theirs = interpolate_bilinear_2d_like_tensorflow1x(
        torch.from_numpy(images.astype(np.float32).transpose(0, 3, 1, 2).copy()),
        size=(299, 299),
        align_corners=False,
    )
    found = resize_from_corner(jnp.asarray(images, jnp.float32), (299, 299))
    assert relative_error(np.asarray(found), theirs.numpy().transpose(0, 2, 3, 1)) <= 1e-5


def features(seed, width=48):
    """Two sets of features of other means and correlations."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(width, width)) / width**0.5
    made = np.abs(rng.normal(size=(400, width)) @ mix + 0.3)
    return made.astype(np.float32), np.abs(rng.normal(size=(300, width))).astype(np.float32)


def test_the_distance_is_torch_fidelitys_and_pytorch_fids(request, monkeypatch):
    from pytorch_fid.fid_score import calculate_frechet_distance
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    made, real = features(request.config.option.seed)
    statistics = [
        fid_features_to_statistics(torch.from_numpy(x.astype(float))) for x in (made, real)
    ]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    found = fidelity.frechet_distance(made, real)
    assert found == pytest.approx(expected, rel=1e-8)
    first, second = (fidelity.moments(x) for x in (made, real))
    for own, theirs in zip((first, second), statistics, strict=True):
        np.testing.assert_allclose(own.mean, theirs["mu"], rtol=1e-12)
        np.testing.assert_allclose(own.covariance, theirs["sigma"], rtol=1e-9, atol=1e-12)
    whole = scipy.linalg.sqrtm
    # pytorch-fid 0.3 asks for the root's error, too, which SciPy 1.17 warns that it will not tell.
    monkeypatch.setattr(scipy.linalg, "sqrtm", lambda x, disp=True: (whole(x), 0))
    old = calculate_frechet_distance(first.mean, first.covariance, second.mean, second.covariance)
    assert found == pytest.approx(old, rel=1e-6)


def test_precision_and_recall_are_torch_fidelitys(request):
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    made, real = features(request.config.option.seed, width=6)
    pair = (torch.from_numpy(x.astype(float)) for x in (made, real))
    found = fidelity.precision_recall(made, real)
    assert found == pytest.approx(calculate_precision_recall_full(*pair, 3), abs=1e-7)
    assert min(found) > 0
    assert max(found) < 1
