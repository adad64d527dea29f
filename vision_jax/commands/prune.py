"""Cuts channels, heads, hidden units and layers out of a trained model.

    vision_jax prune runs/vit --keep=0.5 --to=pruned
    vision_jax prune runs/vit --keep=0.7 --what=mlp,heads --score=taylor --to=pruned
    vision_jax prune embedded:vit_cifar10 --keep=0.5 --what=layers --to=pruned

SOURCE is a run's folder, or weights as `predict --weights` takes them. --to gets model.safetensors,
a model of its family with other widths, from which a config trains on (config.model.weights), and
pruning.json, which says what went. What is lost comes back by training, best with SOURCE as the
teacher; docs/compression.md has the commands.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from vision_jax.commands.source import check_keeps, load_with_run
from vision_jax.errors import UserError, nearest
from vision_jax.files import expand
from vision_jax.flags import make_parser, run

MAGNITUDE, TAYLOR = "magnitude", "taylor"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, or 2 for bad input."""
    return run(lambda: _run(_parse(arguments)), "such a model")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("vision_jax prune", __doc__)
    parser.add_argument("source", metavar="SOURCE", help="what to prune")
    parser.add_argument("--to", type=expand, metavar="DIR", required=True, help="where")
    parser.add_argument("--keep", type=float, required=True, help="the share of each group to keep")
    parser.add_argument(
        "--what",
        default="",
        metavar="KINDS",
        help="of channels,inner,mlp,heads,layers; those that are free where they are zero else",
    )
    parser.add_argument(
        "--score",
        choices=(MAGNITUDE, TAYLOR),
        default=MAGNITUDE,
        help="what stays: the largest weights, or what the loss of a run's own data needs",
    )
    parser.add_argument("--batches", type=int, default=16, help="of training data, for taylor")
    parser.add_argument("--multiple", type=int, default=8, help="that widths are rounded to")
    parser.add_argument("--checkpoint", choices=("last", "best"), help="of a run; last else")
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read pickles, by torch's weights-only reader"
    )
    flags = parser.parse_args(arguments)
    if not 0 < flags.keep < 1:
        raise UserError(f"--keep={flags.keep:g}: give a share above 0 and below 1, such as 0.5")
    for name in ("batches", "multiple"):
        if getattr(flags, name) < 1:
            raise UserError(f"--{name}={getattr(flags, name)}: give 1 or more")
    return flags


def _run(flags: argparse.Namespace) -> int:
    from vision_jax.logging import say
    from vision_jax.models.widths import KINDS
    from vision_jax.run import prune
    from vision_jax.trees import lora

    what, known = tuple(filter(None, flags.what.split(","))), (*KINDS, prune.LAYERS)
    if unknown := next((kind for kind in what if kind not in known), None):
        raise UserError(f"--what={unknown}: known are {', '.join(known)}{nearest(unknown, known)}")
    check_keeps("--to", flags.to, expand(flags.source))
    loaded, run = load_with_run(
        flags.source, checkpoint=flags.checkpoint, allow_pickle=flags.allow_pickle
    )
    variables = {**loaded.variables, "params": lora.merge(loaded.variables["params"])}
    if flags.score == MAGNITUDE:
        scores = prune.magnitude(variables["params"])
    elif run is None:
        raise UserError(
            f"--score=taylor needs a run's data, and {flags.source} is no run's folder: take "
            "--score=magnitude"
        )
    else:
        scores = prune.taylor_of_run(run, variables, flags.batches)
    size = loaded.preprocessing.image_size
    pruned = prune.prune(
        loaded.model,
        variables,
        size,
        scores,
        keep=flags.keep,
        what=what or prune.free_kinds(loaded.model, variables, size),
        multiple=flags.multiple,
    )
    if not pruned.lines:
        raise UserError(
            f"--keep={flags.keep:g} with --multiple={flags.multiple} leaves nothing to cut: lower "
            "--keep or --multiple, or name other kinds by --what"
        )
    smaller = replace(loaded, model=pruned.model, variables=pruned.variables)
    before, after = (
        {
            "parameters": prune.count(one.variables),
            "macs": prune.macs(one.model, one.variables, size),
        }
        for one in (replace(loaded, variables=variables), smaller)
    )
    for line in pruned.lines:
        say(line)
    for name in before:
        say(f"{name} {before[name]:,} -> {after[name]:,} ({after[name] / before[name]:.3f})")
    if not pruned.exact:
        say("norms over what went change the outputs a little even where it was zero")
    _write(flags, smaller, {"before": before, "after": after, "cut": list(pruned.lines)})
    return 0


def _write(flags: argparse.Namespace, smaller: Any, report: dict[str, Any]) -> None:
    import jax

    from vision_jax import convert
    from vision_jax.config import write_json
    from vision_jax.logging import say
    from vision_jax.models import families
    from vision_jax.trees import paths

    family = families.family_of(smaller.model)
    flat = {p: x for tree in smaller.variables.values() for p, x in paths.flatten(tree).items()}
    tensors, header = convert.export_weights(
        jax.device_get(flat),
        family,
        convert.arguments_of(smaller.model),
        to=convert.own_naming(family),
        class_names=smaller.class_names,
        preprocessing=asdict(smaller.preprocessing),
    )
    flags.to.mkdir(parents=True, exist_ok=True)
    convert.write_safetensors(flags.to / "model.safetensors", tensors, header)
    asked = {name: getattr(flags, name) for name in ("source", "keep", "what", "score", "multiple")}
    write_json(asked | report, flags.to / "pruning.json")
    say(f"wrote {flags.to}: model.safetensors, pruning.json")


if __name__ == "__main__":
    sys.exit(main())
