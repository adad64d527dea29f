"""Files of quantized and factored models: leaves as they are, bit-identical when they are read.

A safetensors file in the parameters' own names, a kernel being a folder of its arrays; the header
says what the model is, and of each such kernel how it was made. One of float factors is also read
as plain weights: its kernels multiplied out, in the naming of a run's own files.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from vision_jax.checksums import verify_checksums
from vision_jax.convert.files import (
    QUANTIZED_KEY,
    Tensor,
    Tensors,
    open_safetensors,
    write_safetensors,
)
from vision_jax.convert.load import export_weights
from vision_jax.convert.read import RUN_FILE, WEIGHTS_FILE
from vision_jax.convert.tables import as_tuples, own_naming
from vision_jax.errors import UserError
from vision_jax.files import expand, parse_json
from vision_jax.models.families import FAMILIES, RUN_ARGUMENTS, check_arguments
from vision_jax.trees import paths, quantize
from vision_jax.trees.factored import factor_paths

OWN_KEY = "vision_jax"  # of the metadata of plain weights: what the model is


@dataclass(frozen=True)
class QuantizedFile:
    """What a file of a quantized model holds.

    Attributes:
      family: of the model, and `arguments` of it.
      preprocessing: of its images.
      class_names: by label.
      described: how each quantized or factored kernel was made (trees.quantize.describe).
      tensors: by path; BatchNorm's statistics too.
      origin: the file.
    """

    family: str
    arguments: dict[str, Any]
    preprocessing: dict[str, Any]
    class_names: tuple[str, ...]
    described: dict[str, Any]
    tensors: Mapping[str, np.ndarray]
    origin: str

    @property
    def ranks(self) -> dict[str, int]:
        """Of the kernels that are two factors, by path."""
        return {path: told["rank"] for path, told in self.described.items() if "rank" in told}

    def variables(self, shapes: Mapping[str, Any]) -> dict[str, Any]:
        """The model's variables, out of their ShapeDtypeStructs of plain kernels.

        Raises:
          UserError: the file has others.
        """
        try:
            params = quantize.like(shapes["params"], self.described)
        except UserError as error:
            raise UserError(f"{self.origin}: {error}") from None
        trees = {**shapes, "params": params}
        wanted = {path: x for tree in trees.values() for path, x in paths.flatten(tree).items()}
        if odd := sorted(wanted.keys() ^ set(self.tensors)):
            raise UserError(f"{self.origin}: {odd[0]} should be {_where(odd[0] in wanted)}")
        for path, leaf in wanted.items():
            found = self.tensors[path]
            if (found.shape, found.dtype) != (leaf.shape, leaf.dtype):
                raise UserError(
                    f"{self.origin}: {path} is {found.dtype}{list(found.shape)}, and the model's "
                    f"is {leaf.dtype}{list(leaf.shape)}"
                )
        return {
            name: paths.unflatten(tree, {path: self.tensors[path] for path in paths.flatten(tree)})
            for name, tree in trees.items()
        }


def write_quantized(
    path: str | os.PathLike[str],
    variables: Mapping[str, Any],
    *,
    family: str,
    arguments: Mapping[str, Any],
    preprocessing: Mapping[str, Any],
    class_names: Sequence[str],
) -> None:
    """Writes a model whose kernels may be leaves of trees/quantized.py and trees/factored.py.

    Args:
      path: of the file.
      variables: {"params": ...} and perhaps {"batch_stats": ...}, on the host.
      family, arguments: of the model; how it computes is left out.
      preprocessing: of its images.
      class_names: by label.

    Raises:
      UserError: the file cannot be written.
    """
    header = {
        "family": family,
        "arguments": {n: value for n, value in arguments.items() if n not in RUN_ARGUMENTS},
        "preprocessing": dict(preprocessing),
        "class_names": list(class_names),
        "kernels": quantize.describe(variables["params"]),
    }
    tensors = {
        path: np.asarray(x)
        for tree in variables.values()
        for path, x in paths.flatten(tree).items()
    }
    write_safetensors(path, tensors, {"format": "vision_jax", QUANTIZED_KEY: json.dumps(header)})


def read_quantized(spec: str) -> QuantizedFile | None:
    """The file at a path, or in a folder as model.safetensors; None if it is no such file.

    Raises:
      UserError: a damaged one.
    """
    path = expand(spec)
    folder, path = path, path / WEIGHTS_FILE if path.is_dir() else path
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    tensors, metadata = open_safetensors(path)
    if QUANTIZED_KEY not in metadata:
        return None
    if (folder / RUN_FILE).is_file():
        verify_checksums(folder, only=WEIGHTS_FILE)
    return _checked(path, tensors, metadata[QUANTIZED_KEY])


def multiplied_out(path: Path, tensors: Tensors, text: str) -> tuple[Tensors, dict[str, str]]:
    """(tensors in the naming of a run's own files, their header) of a file of float factors.

    Args:
      path: of the file.
      tensors: of the file.
      text: of its QUANTIZED_KEY.

    Raises:
      UserError: a damaged file, or one in few bits.
    """
    held = _checked(path, tensors, text)
    if quantize.is_quantized(held.described):
        raise UserError(
            f"{path} is a quantized model, which vision_jax.load, predict and export take: "
            "for anything else take the float weights that it was made of"
        )
    entries = dict(tensors.entries)
    for kernel, rank in held.ranks.items():
        u, v = (entries.pop(path, None) for path in factor_paths(kernel))
        if not u or not v or len(v.shape) != 2 or not u.shape[-1] == rank == v.shape[0]:
            raise UserError(f"{path}: {kernel} should be two factors of rank {rank}, and is not")
        entries[kernel] = Tensor((*u.shape[:-1], v.shape[1]), u.dtype, partial(_product, u, v))
    defaults = FAMILIES[held.family].defaults
    plain, header = export_weights(
        Tensors(entries),
        held.family,
        {**defaults, **held.arguments},
        to=own_naming(held.family),
        class_names=held.class_names,
        preprocessing=held.preprocessing,
    )
    told = json.loads(header[OWN_KEY]) | {"ranks": held.ranks}
    return cast(Tensors, plain), header | {OWN_KEY: json.dumps(told)}


def _product(u: Tensor, v: Tensor) -> np.ndarray:
    return u.read() @ v.read()


def _checked(path: Path, tensors: Mapping[str, np.ndarray], text: str) -> QuantizedFile:
    try:
        header = parse_json(text.encode(), str(path))
        arguments = {name: as_tuples(value) for name, value in header["arguments"].items()}
        check_arguments(header["family"], arguments)
        names = header["class_names"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError("`class_names` is no list of texts")
        return QuantizedFile(
            header["family"],
            arguments,
            dict(header["preprocessing"]),
            tuple(names),
            dict(header["kernels"]),
            tensors,
            str(path),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: its header is damaged ({type(error).__name__}: {error})"
        ) from None


def _where(wanted: bool) -> str:
    return "there, and is missing" if wanted else "absent, and is there"
