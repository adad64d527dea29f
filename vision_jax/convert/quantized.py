"""Files of quantized models: leaves as they are, so that what is read is bit-identical.

A safetensors file in the parameters' own names, a kernel being a folder of its arrays; the header
says what the model is, and of each quantized kernel how it was made.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vision_jax.convert.files import QUANTIZED_KEY, open_safetensors, write_safetensors
from vision_jax.convert.read import WEIGHTS_FILE
from vision_jax.convert.tables import as_tuples
from vision_jax.errors import UserError
from vision_jax.files import expand, parse_json
from vision_jax.models.families import RUN_ARGUMENTS, check_arguments
from vision_jax.trees import paths, quantize


@dataclass(frozen=True)
class QuantizedFile:
    """What a file of a quantized model holds.

    Attributes:
      family: of the model, and `arguments` of it.
      preprocessing: of its images.
      class_names: by label.
      described: how each quantized kernel was made (trees.quantize.describe).
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
    """Writes a model whose kernels may be leaves that trees/quantized.py has.

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
    path = path / WEIGHTS_FILE if path.is_dir() else path
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    tensors, metadata = open_safetensors(path)
    if QUANTIZED_KEY not in metadata:
        return None
    return _checked(path, tensors, metadata[QUANTIZED_KEY])


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
