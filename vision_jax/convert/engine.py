"""Tensors of a checkpoint to parameters of a model and back, by one table read in both directions.

A list of `Rule`s says it: names in the file, paths in our tree, and the layout between them, and
`Fixed` tensors that the architecture determines. Nothing is matched by guess: each tensor of the
file is consumed, each parameter is filled, or the error lists both sides.
"""

import difflib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from vision_jax.convert.files import Tensor, Tensors
from vision_jax.errors import UserError

Arrays = Sequence[np.ndarray]
LISTED = 5  # names that an error message prints of each kind


@dataclass(frozen=True)
class Layout:
    """A reversible rearrangement: arrays of the file -> arrays of the tree, and back."""

    to_tree: Callable[[Arrays], Arrays]
    to_file: Callable[[Arrays], Arrays]


def _each(to_tree: Callable[..., Any], to_file: Callable[..., Any]) -> Layout:
    return Layout(lambda xs: [to_tree(x) for x in xs], lambda xs: [to_file(x) for x in xs])


@dataclass(frozen=True)
class Fixed:
    """A tensor that follows from the architecture: checked on import, written on export.

    Attributes:
      name: in the file.
      make: its value. Called only when needed.
      exact: False where the file's values differ by rounding from build to build.
      written: False if only older files have it.
    """

    name: str
    make: Callable[[], np.ndarray]
    exact: bool = True
    written: bool = True

    def agrees(self, tensor: np.ndarray) -> bool:
        """Whether a file's tensor is this one."""
        value = self.make()
        if tensor.shape != value.shape:
            return False
        if self.exact:
            return bool(np.array_equal(tensor, value))
        return bool(np.allclose(tensor, value, rtol=0.01, atol=0.01))  # files in half precision


COPY = _each(lambda x: x, lambda x: x)
LINEAR = _each(lambda x: x.swapaxes(-1, -2), lambda x: x.swapaxes(-1, -2))  # [out, in], [in, out]
CONV = _each(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # OIHW, HWIO
# [out, in, 1, 1] of a 1 x 1 convolution, [in, out].
POINTWISE = _each(lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None])
COUNT = _each(lambda x: x, lambda x: x.astype(np.int64))  # torch counts in 64 bits
ADD_1 = _each(lambda x: x[None], lambda x: x[0])  # [N, D], [1, N, D]
ADD_2 = _each(lambda x: x[None, None], lambda x: x[0, 0])  # [D], [1, 1, D]
# Three tensors of the file beside each other in one of ours: [D, D] × 3, [D, 3·D].
FUSE_LINEAR = Layout(
    lambda xs: [np.concatenate([x.T for x in xs], axis=1)],
    lambda xs: [part.T for part in np.split(xs[0], 3, axis=1)],
)
FUSE_BIAS = Layout(lambda xs: [np.concatenate(xs)], lambda xs: np.split(xs[0], 3))
# One packed tensor of the file in three of ours: [3·D, D], [D, D] × 3.
UNPACK_LINEAR = Layout(
    lambda xs: [part.T for part in np.split(xs[0], 3)],
    lambda xs: [np.concatenate([x.T for x in xs])],
)
UNPACK_BIAS = Layout(FUSE_BIAS.to_file, FUSE_BIAS.to_tree)
# One packed tensor of the file in two of ours: [3·D, D], ([D, D] of q, [D, 2·D] of k and v).
SPLIT_LINEAR = Layout(
    lambda xs: [part.T for part in np.split(xs[0], [xs[0].shape[0] // 3])],
    lambda xs: [np.concatenate([x.T for x in xs])],
)
SPLIT_BIAS = Layout(
    lambda xs: np.split(xs[0], [xs[0].shape[0] // 3]), lambda xs: [np.concatenate(xs)]
)


@dataclass(frozen=True)
class Rule:
    """Names of tensors in the file, the paths of the parameters that they are, and the layout.

    `default` fills the paths of a rule whose tensors the file may lack; with `written` False an
    export leaves them out.
    """

    names: tuple[str, ...]
    paths: tuple[str, ...]
    layout: Layout = COPY
    default: float | None = None
    written: bool = True


Rules = Sequence[Rule | Fixed]


def expand(rules: Sequence[Rule], depth: int) -> list[Rule]:
    """The rules with `{i}` in names and paths written out for blocks 0 to depth - 1."""

    def fill(rule: Rule, i: int) -> Rule:
        names = tuple(name.replace("{i}", str(i)) for name in rule.names)
        paths = tuple(path.replace("{i}", str(i)) for path in rule.paths)
        # `replace` takes ten times as long.
        return Rule(names, paths, rule.layout, rule.default, rule.written)

    return [
        expanded
        for rule in rules
        for expanded in (
            [fill(rule, i) for i in range(depth)]
            if any("{i}" in text for text in (*rule.names, *rule.paths))
            else [rule]
        )
    ]


def one(name: str, path: str, layout: Layout = COPY) -> tuple[Rule]:
    """The rule of a single tensor."""
    return (Rule((name,), (path,), layout),)


def batch_norm(name: str, path: str) -> tuple[Rule, ...]:
    """The five rules of a BatchNorm; files from before torch 0.4.1 have no count of updates."""
    return (
        *norm(name, path),
        Rule((f"{name}.running_mean",), (f"{path}/mean",)),
        Rule((f"{name}.running_var",), (f"{path}/var",)),
        Rule((f"{name}.num_batches_tracked",), (f"{path}/count",), COUNT, default=0),
    )


def affine(name: str, path: str, layout: Layout = LINEAR) -> tuple[Rule, Rule]:
    """The two rules of a layer `name.weight`, `name.bias` -> `path/kernel`, `path/bias`."""
    return (
        Rule((f"{name}.weight",), (f"{path}/kernel",), layout),
        Rule((f"{name}.bias",), (f"{path}/bias",)),
    )


def norm(name: str, path: str) -> tuple[Rule, Rule]:
    """The two rules of a norm `name.weight`, `name.bias` -> `path/scale`, `path/bias`."""
    return (
        Rule((f"{name}.weight",), (f"{path}/scale",)),
        Rule((f"{name}.bias",), (f"{path}/bias",)),
    )


def fused(names: Sequence[str], path: str) -> tuple[Rule, Rule]:
    """The two rules of three linear layers that are one fused layer of ours."""
    return (
        Rule(tuple(f"{name}.weight" for name in names), (f"{path}/kernel",), FUSE_LINEAR),
        Rule(tuple(f"{name}.bias" for name in names), (f"{path}/bias",), FUSE_BIAS),
    )


def import_tensors(
    tensors: Mapping[str, np.ndarray],
    rules: Rules,
    target: Mapping[str, Any],
    *,
    skip: Collection[str] = (),
    dropped: Sequence[str] = (),
    adapt: Callable[[str, np.ndarray], np.ndarray] = lambda path, array: array,
    place: Callable[[str, np.ndarray], Any] = lambda path, array: array,
) -> dict[str, Any]:
    """Parameters by path from the tensors of a file, all of them or none.

    Args:
      tensors: the file's tensors by name.
      rules: the table, for the architecture at hand.
      target: path -> anything with a shape and a dtype (`jax.ShapeDtypeStruct`).
      skip: paths that the caller initializes itself: their tensors, if the file has them, count as
        consumed whatever their shape.
      dropped: regular expressions of whole tensor names that the model has no use for.
      adapt: (path, array) -> array, for another image size or number of channels.
      place: (path, array of the target's shape and dtype) -> what the result has of it, a device's
        array, say. Called array by array, so that never all of them are on the host.

    Returns:
      path -> what `place` made of its array, for each path of `target` not in `skip`. Where no
      copy was needed the arrays share memory with `tensors`.

    Raises:
      UserError: tensors left over, parameters left out, shapes that differ: all listed.
      ValueError: the table writes one parameter twice.
    """
    filled: dict[str, Any] = {}
    consumed: set[str] = set()
    misfits: list[str] = []
    lacking: list[str] = []
    for rule in rules:
        if isinstance(rule, Fixed):
            if rule.name in tensors:
                consumed.add(rule.name)
                if not rule.agrees(tensors[rule.name]):
                    misfits.append(f"{rule.name} has not the values that the architecture gives it")
            continue
        present = [name for name in rule.names if name in tensors]
        if not present:
            if rule.default is not None:
                for path in set(rule.paths) & set(target) - set(skip):
                    value = np.full(target[path].shape, rule.default, target[path].dtype)
                    filled[path] = place(path, value)
            continue
        wanted = [path for path in rule.paths if path in target and path not in skip]
        if not wanted:
            if any(path in skip for path in rule.paths):
                consumed.update(present)
            continue
        consumed.update(present)
        if len(present) < len(rule.names):
            lacking += [name for name in rule.names if name not in tensors]
            continue
        try:
            arrays = rule.layout.to_tree([tensors[name] for name in rule.names])
        except UserError:  # what a layout says of the numbers
            raise
        except (ValueError, IndexError):  # too few axes, or parts that do not fit each other
            shapes = ", ".join(f"{name} {tensors[name].shape}" for name in rule.names)
            misfits.append(f"{shapes} for {rule.paths[0]} {_shape(target, rule.paths[0])}")
            filled.update(dict.fromkeys(rule.paths))
            continue
        for path, array in zip(rule.paths, arrays, strict=True):
            if path in filled:
                raise ValueError(f"the table writes {path} twice: again from {rule.names}")
            filled[path] = None
            if path in target:
                array = adapt(path, array)
            if path not in target or array.shape != tuple(target[path].shape):
                names = ", ".join(f"{name} {tensors[name].shape}" for name in rule.names)
                misfits.append(f"{names} for {path} {_shape(target, path)}, not {array.shape}")
            elif _kind(array.dtype) != _kind(target[path].dtype):
                misfits.append(f"{rule.names[0]} is {array.dtype}, {path} {target[path].dtype}")
            elif path not in skip:
                filled[path] = place(path, np.asarray(array, target[path].dtype))
    missing = [path for path in target if path not in filled and path not in skip]
    unexpected = [
        name
        for name in tensors
        if name not in consumed and not any(re.fullmatch(rule, name) for rule in dropped)
    ]
    if missing or unexpected or misfits or lacking:
        raise UserError(_complaint(missing, lacking, unexpected, misfits, rules, target))
    return {path: value for path, value in filled.items() if path not in skip}


def export_tensors(params: Mapping[str, np.ndarray], rules: Rules) -> dict[str, np.ndarray]:
    """The inverse of `import_tensors`: tensors by the file's names, bit-identical.

    Raises:
      UserError: a parameter that the table has no name for.
    """
    tensors: dict[str, np.ndarray] = {}
    written: set[str] = set()
    for rule in rules:
        if isinstance(rule, Fixed):
            if rule.written:
                tensors[rule.name] = rule.make()
            continue
        if not all(path in params for path in rule.paths):
            continue
        written.update(rule.paths)
        if not rule.written:
            continue
        arrays = rule.layout.to_file([np.asarray(params[path]) for path in rule.paths])
        for name, array in zip(rule.names, arrays, strict=True):
            if name in tensors:
                raise ValueError(f"the table writes tensor {name} twice: again from {rule.paths}")
            tensors[name] = np.asarray(array, order="C")  # keeps a scalar a scalar
    _check_named(params, written)
    return tensors


def import_lazily(
    tensors: Tensors,
    rules: Rules,
    target: Mapping[str, Any],
    adapt: Callable[[str, np.ndarray], np.ndarray],
) -> Tensors:
    """What `import_tensors` gives, where that is known to succeed, computed when asked for."""
    rule_of: dict[str, Rule] = {}
    for rule in rules:
        present = isinstance(rule, Rule) and any(name in tensors for name in rule.names)
        if isinstance(rule, Rule) and (present or rule.default is not None):
            rule_of.update({path: rule for path in rule.paths if present or path not in rule_of})

    def read(path: str) -> np.ndarray:
        rule = rule_of[path]
        own = {name: tensors[name] for name in rule.names if name in tensors}
        wanted = {path: target[path] for path in rule.paths}
        return import_tensors(own, [rule], wanted, adapt=adapt)[path]

    return Tensors(
        {
            path: Tensor(tuple(like.shape), np.dtype(like.dtype), partial(read, path))
            for path, like in target.items()
        }
    )


def export_lazily(params: Tensors, rules: Rules) -> Tensors:
    """What `export_tensors` gives, computed tensor by tensor when asked for.

    Raises:
      UserError: a parameter that the table has no name for.
    """

    def read(rule: Rule, name: str) -> np.ndarray:
        return export_tensors({path: params[path] for path in rule.paths}, [rule])[name]

    entries: dict[str, Tensor] = {}
    named: set[str] = set()
    for rule in rules:
        if isinstance(rule, Fixed):
            if rule.written:
                value = rule.make()
                entries[rule.name] = Tensor(value.shape, value.dtype, rule.make)
        elif all(path in params for path in rule.paths):
            named.update(rule.paths)
            if not rule.written:
                continue
            own = [params.entries[path] for path in rule.paths]
            stand_ins = [np.broadcast_to(np.zeros((), x.dtype), x.shape) for x in own]
            for name, like in zip(rule.names, rule.layout.to_file(stand_ins), strict=True):
                if name in entries:
                    raise ValueError(f"the table writes tensor {name} twice: from {rule.paths}")
                entries[name] = Tensor(like.shape, like.dtype, partial(read, rule, name))
    _check_named(params, named)
    return Tensors(entries)


def _check_named(params: Collection[str], named: Collection[str]) -> None:
    if left := [path for path in params if path not in named]:
        raise UserError(
            f"this naming has no name for {_some(left)}: export in timm's naming, which has them"
        )


def tree_shapes(
    file_shapes: Mapping[str, tuple[int, ...]], rules: Rules
) -> dict[str, tuple[int, ...]]:
    """Shapes that the parameters would have, as far as the file's tensors say: path -> shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for rule in rules:
        if isinstance(rule, Fixed) or not all(name in file_shapes for name in rule.names):
            continue
        stand_ins = [np.empty(file_shapes[name], np.bool_) for name in rule.names]
        try:
            arrays = rule.layout.to_tree(stand_ins)
        except (ValueError, IndexError):
            continue  # the import itself reports it, against the shape that is wanted
        shapes.update({path: x.shape for path, x in zip(rule.paths, arrays, strict=True)})
    return shapes


def _kind(dtype: Any) -> str:
    return "float" if np.issubdtype(dtype, np.floating) else "integer"


def _shape(target: Mapping[str, Any], path: str) -> Any:
    return tuple(target[path].shape) if path in target else "(not in the model)"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _complaint(
    missing: Sequence[str],
    lacking: Sequence[str],
    unexpected: Sequence[str],
    misfits: Sequence[str],
    rules: Rules,
    target: Mapping[str, Any],
) -> str:
    source_of = {
        path: rule.names[0] for rule in rules if isinstance(rule, Rule) for path in rule.paths
    }
    parts = []
    if misfits:
        parts.append(f"{len(misfits)} do not fit: {'; '.join(misfits[:LISTED])}")
    if lacking:
        parts.append(f"{len(lacking)} tensors of a fused parameter lack: {_some(lacking)}")
    if missing:
        named = [f"{path} (from {source_of.get(path, 'no tensor')})" for path in missing]
        parts.append(f"{len(missing)} parameters get no tensor: {_some(named)}")
    if unexpected:
        near = difflib.get_close_matches(unexpected[0], list(source_of.values()), n=1)
        hint = f"; the nearest known name to {unexpected[0]} is {near[0]}" if near else ""
        parts.append(
            f"{len(unexpected)} tensors have no place: {_some(unexpected)}{hint}; "
            "config.model.drop (--drop of the converter) names the ones to leave out on purpose"
        )
    return "the weights are not this model's: " + " | ".join(parts)
