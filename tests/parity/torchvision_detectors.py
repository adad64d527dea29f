"""What the tests of torchvision's detectors share: imports, outputs of ours, images of theirs."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from vision_jax import convert
from vision_jax.certify.random_weights import randomize, randomize_statistics, sample_images
from vision_jax.certify.references import Reference
from vision_jax.convert.engine import import_tensors
from vision_jax.convert.files import Tensors, held
from vision_jax.convert.tables import find_table
from vision_jax.models.families import build_model
from vision_jax.trees import paths

SIDE, SLOTS = 64, 24
CASES = {  # of boxes in images of SIDE
    "plain": {"counts": (3, 1)},
    "an image without boxes": {"counts": (0, 2)},
    "no boxes at all": {"counts": (0, 0)},
    "crowds": {"counts": (SLOTS, SLOTS), "sides": (20, 40)},
    "of a pixel": {"counts": (4, 2), "sides": (1, 2)},
}


def calibrate(model, make_raw, outputs, spread):
    """Random weights and statistics, and heads whose outputs find something.

    Args:
      model: torchvision's.
      make_raw: model -> itself, of raw outputs.
      outputs: (model, images) -> raw outputs.
      spread: module of a head -> standard deviation of its outputs.
    """
    randomize(model, 0)
    randomize_statistics(Reference("torchvision", make_raw(model), "", {}), (128, 128), 3, 0)
    images = torch.tensor(sample_images(2, (128, 160), 3, 0)).permute(0, 3, 1, 2).float()
    own = dict(model.named_modules())
    for name in filter(own.__contains__, spread):
        module, seen = own[name], []
        hook = module.register_forward_hook(partial(_keep, seen))
        with torch.no_grad():
            outputs(model, 4 * (images - 0.5))
            scale = spread[name] / torch.cat(seen).std()
            for parameter in module.parameters():
                parameter *= scale
        hook.remove()
    del model.forward  # the class's own again
    return model


def _keep(seen, module, inputs, output):
    seen.append(output.detach().flatten())


def on_a_canvas(sizes, canvas):
    """Images f[B, H, W, 3] of these sizes, upper left on white, and where: bool[B, H, W]."""
    images, mask = np.ones((len(sizes), *canvas, 3)), np.zeros((len(sizes), *canvas), bool)
    for image, there, (height, width) in zip(images, mask, sizes, strict=True):
        image[:height, :width] = sample_images(1, (height, width), 3, height)[0]
        there[:height, :width] = True
    return images, mask


def old_names(tensors, rename):
    """As torchvision before 0.13 and the published v1 have them: norms without counts.

    `rename`: a name -> that of the older files, of what is not the pyramid's.
    """
    pyramid = re.compile(r"((?:inner|layer)_blocks\.\d)\.0\.")
    return {
        rename(pyramid.sub(r"\1.", name)): x
        for name, x in tensors.items()
        if not name.endswith("num_batches_tracked")
    }


def check_older_names(module, older):
    """They give the same arrays."""
    _, expected = imported(module)
    arguments, found = imported(module, older)
    assert arguments["batch_norm_eps"] == 1e-5
    for path, array in found.items():
        wanted = np.zeros_like(array) if path.endswith("count") else expected[path]
        np.testing.assert_array_equal(array, wanted, err_msg=path)


def check_epsilon(older, builder, published, folder):
    """By the file's name, by torchvision's name of the weights, or by a config of ours."""
    for name, epsilon in ((f"{published}-eeacb38b", 0.0), ("mine", 1e-5)):
        file = folder / f"{name}.safetensors"
        convert.write_safetensors(file, older)
        weights = convert.read_weights(str(file))
        assert convert.recognize(weights)[1]["batch_norm_eps"] == epsilon
        assert f"batch_norm_eps={epsilon}" in convert.assumptions(weights)
    said = {"library": "torchvision", "model": builder}
    for config in ({"weights": "COCO_V1"}, {"norm_eps": 0.0}):
        given = replace(weights, metadata={"config": said | config})
        assert convert.recognize(given)[1]["batch_norm_eps"] == 0.0
        assert convert.assumptions(given) == ("batch_norm_eps=0.0, by the weights' name",)


def zeros(family, arguments):
    """Arrays by path of such a model."""
    built = build_model(family, **arguments)
    like = jax.eval_shape(built.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    flat = {path: x for tree in like.values() for path, x in paths.flatten(tree).items()}
    return {path: np.zeros(x.shape, x.dtype) for path, x in flat.items()}


def random_targets(classes, counts, sides=(8, 45)):
    """(label, boxes cxcywh in [0, 1], mask) of images of about SIDE pixels, `counts` boxes each."""
    rng = np.random.default_rng(3)
    size = rng.uniform(*sides, (len(counts), SLOTS, 2)) / SIDE
    centers = size / 2 + (1 - size) * rng.random(size.shape)
    mask = np.arange(SLOTS)[None] < np.array(counts)[:, None]
    return {
        "label": rng.integers(0, classes, mask.shape),
        "boxes_cxcywh_01": np.concatenate([centers, size], axis=-1),
        "target_mask": mask,
    }


def as_theirs(targets, sizes, first=0):
    """torchvision's targets, of images of these sizes; `first`: their label of our label 0."""
    given = []
    rows = (targets[name] for name in ("label", "boxes_cxcywh_01", "target_mask"))
    for (height, width), label, boxes, mask in zip(sizes, *rows, strict=True):
        boxes = boxes[mask] * [width, height, width, height]
        center, half = boxes[:, :2], boxes[:, 2:] / 2
        corners = np.concatenate([center - half, center + half], axis=-1)
        given.append({"boxes": torch.tensor(corners), "labels": torch.tensor(label[mask] + first)})
    return given


def to_train(module):
    """In training but for its norms, without gradients."""
    module.train()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()
    module.zero_grad()


def check_gradients(gradients, module):
    """Ours are those of torchvision's module, to 1e-10."""
    tensors = {name: x.numpy() for name, x in module.state_dict().items()}
    tensors |= {
        name: np.zeros(x.shape) if x.grad is None else x.grad.numpy()
        for name, x in module.named_parameters()
    }
    _, expected = imported(module, tensors)
    for path, gradient in paths.flatten(gradients).items():
        scale = max(np.abs(expected[path]).max(), 1e-6)
        assert np.abs(gradient - expected[path]).max() <= 1e-10 * scale, path


def imported(model, tensors=None, metadata=None):
    """(arguments, parameters and statistics by path) of a reference's tensors, as precise."""
    tensors = tensors or {name: x.numpy() for name, x in model.state_dict().items()}
    weights = convert.Weights(
        Tensors({name: held(array) for name, array in tensors.items()}), metadata or {}, None, "it"
    )
    family, arguments = convert.recognize(weights)
    built = build_model(family, **arguments)
    like = jax.eval_shape(built.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    table = find_table(weights.tensors.shapes)
    target = {path: x for tree in like.values() for path, x in paths.flatten(tree).items()}
    if any(x.dtype == np.float64 for x in tensors.values()):
        kinds = {
            path: np.float64 if x.dtype == np.float32 else x.dtype for path, x in target.items()
        }
        target = {path: x.update(dtype=kinds[path]) for path, x in target.items()}
    return arguments, import_tensors(weights.tensors, table.rules(arguments), target)


def variables_of(flat, dtype):
    """The collections of arrays by path, in a precision."""
    cast = {
        path: jnp.asarray(x, dtype if np.issubdtype(x.dtype, np.floating) else None)
        for path, x in flat.items()
    }
    statistics = ("/mean", "/var", "/count")
    return {
        "params": paths.nest({p: x for p, x in cast.items() if not p.endswith(statistics)}),
        "batch_stats": paths.nest({p: x for p, x in cast.items() if p.endswith(statistics)}),
    }


def apply(model, flat, images, *rest, dtype="float64", **keywords):
    """Outputs of a model of ours, of images f[B, H, W, 3] and so on."""
    with jax.enable_x64(dtype == "float64"):
        given = (variables_of(flat, dtype), jnp.asarray(images, dtype), *map(jnp.asarray, rest))
        outputs = jax.jit(partial(model.apply, **keywords))(*given)
        return jax.tree.map(np.asarray, outputs)


def sees(model, *images):
    """What torchvision's own forward takes of images f[H, W, 3], which it does not resize."""
    model.transform.min_size = (min(images[0].shape[:2]),)
    model.transform.max_size = max(images[0].shape[:2])
    dtype = next(model.parameters()).dtype
    return [torch.tensor(image.transpose(2, 0, 1), dtype=dtype) for image in images]


def normalized(images, dtype="float64"):
    mean, std = (np.array(x) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    array = ((images - mean) / std).transpose(0, 3, 1, 2)
    return torch.tensor(array, dtype=getattr(torch, dtype))
