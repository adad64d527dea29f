"""What the tests of torchvision's detectors share: imports, outputs of ours, images of theirs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import torch

from vision_jax import convert
from vision_jax.convert.engine import import_tensors
from vision_jax.convert.files import Tensors, held
from vision_jax.convert.tables import find_table
from vision_jax.models.families import build_model
from vision_jax.trees import paths


def keep(seen, module, inputs, output):
    seen.append(output.detach().flatten())


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
