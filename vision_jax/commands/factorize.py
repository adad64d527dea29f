"""Makes two narrow products of the layers of a trained model, where little is lost by it.

    vision_jax factorize runs/vit --keep=0.5 --to=factored
    vision_jax factorize timm/resnet50 --keep=0.7 --of=parameters --to=factored

SOURCE is a run's folder, or weights as `predict --weights` takes them. Each kernel gets a rank of
its own, out of one budget for the whole model; heads and box outputs stay as they are. --to gets
model.safetensors, from which a config trains on (config.model.weights) and which load and export
take, factorization.json and factorization.png. What is lost comes back by training, best with
SOURCE as the teacher; docs/compression.md has the commands.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from vision_jax.commands.source import check_keeps, load_with_run
from vision_jax.errors import UserError
from vision_jax.files import expand
from vision_jax.flags import make_parser, run
from vision_jax.logging import say

OUTPUTS, WEIGHTS = "outputs", "weights"
PRODUCTS, PARAMETERS = "products", "parameters"
COLUMNS = ("kernel", "shape", "rank", "products", "left out")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, or 2 for bad input."""
    return run(lambda: _run(_parse(arguments)), "such a model")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("vision_jax factorize", __doc__)
    parser.add_argument("source", metavar="SOURCE", help="what to factorize")
    parser.add_argument("--to", type=expand, metavar="DIR", required=True, help="where")
    parser.add_argument(
        "--keep", type=float, required=True, help="the share of the model's products to keep"
    )
    parser.add_argument(
        "--of",
        choices=(PRODUCTS, PARAMETERS),
        default=PRODUCTS,
        help="what --keep is a share of",
    )
    parser.add_argument(
        "--score",
        choices=(OUTPUTS, WEIGHTS),
        help="what is kept: of the layers' outputs on a run's own images, which is what a run's "
        "folder has else, or of their weights",
    )
    parser.add_argument("--images", type=int, default=128, help="training images, for outputs")
    parser.add_argument("--multiple", type=int, default=8, help="of all ranks")
    parser.add_argument("--checkpoint", choices=("last", "best"), help="of a run; last else")
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read pickles, by torch's weights-only reader"
    )
    flags = parser.parse_args(arguments)
    if not 0 < flags.keep < 1:
        raise UserError(f"--keep={flags.keep:g}: give a share above 0 and below 1, such as 0.5")
    for name in ("images", "multiple"):
        if getattr(flags, name) < 1:
            raise UserError(f"--{name}={getattr(flags, name)}: give 1 or more")
    return flags


def _run(flags: argparse.Namespace) -> int:
    import jax

    from vision_jax.models import families
    from vision_jax.run import calibrate, factorize, prune
    from vision_jax.trees import lora

    check_keeps("--to", flags.to, expand(flags.source))
    loaded, run = load_with_run(
        flags.source, checkpoint=flags.checkpoint, allow_pickle=flags.allow_pickle
    )
    _check_whole(flags.source, loaded.variables["params"], is_run=run is not None)
    # A loop over blocks needs equal ranks.
    loaded = replace(loaded, model=families.unrolled(loaded.model))
    score = flags.score or (OUTPUTS if run is not None else WEIGHTS)
    params = jax.jit(lora.merge)(loaded.variables["params"])
    variables = {**loaded.variables, "params": params}
    state, size = variables.get("batch_stats", {}), loaded.preprocessing.image_size
    find = partial(
        factorize.find_layers, loaded.model, variables, size, of_parameters=flags.of == PARAMETERS
    )
    if score == WEIGHTS:
        layers = find()
    elif run is None or not hasattr(run.task, "make_batches"):
        raise UserError(
            "--score=outputs is measured on the images of a classifier's, detector's or "
            f"segmenter's run, and {flags.source} is none: take --score=weights"
        )
    else:
        batches = calibrate.read_batches(run, flags.images)
        layers = find(moments_of=partial(factorize.output_moments, run, params, state, batches))
        say(f"measured on {flags.images} training images, {len(layers)} kernels")
        layers = factorize.weigh(run, params, state, batches, layers, flags.multiple)

    def costs(variables: Any) -> dict[str, int]:
        products = prune.macs(loaded.model, variables, size)
        return {PARAMETERS: prune.count(variables), PRODUCTS: products}

    before = costs(variables)
    wanted = (1 - flags.keep) * before[flags.of]
    ranks = factorize.choose_ranks(layers, wanted, flags.multiple)
    saved = sum(layers[path].cost(0) - layers[path].cost(rank) for path, rank in ranks.items())
    if saved < wanted:
        raise UserError(
            f"--keep={flags.keep:g}: factors of rank {flags.multiple} everywhere would leave "
            f"{1 - saved / before[flags.of]:.3f} of the {flags.of}: raise --keep or lower "
            "--multiple"
        )
    smaller = {**variables, "params": factorize.factor(params, ranks, layers)}
    after = costs(smaller)
    report: dict[str, Any] = {
        **{name: getattr(flags, name) for name in ("source", "keep", "of", "multiple")},
        "score": score,
        "image_size": list(size),  # whose rows are counted
        "before": before,
        "after": after,
        "kernels": [_told(path, layer, ranks.get(path, 0)) for path, layer in layers.items()],
    }
    if run is not None and hasattr(run.task, "make_batches"):
        trees = {"whole": params, "factored": smaller["params"]}
        report["evaluation"] = calibrate.evaluate_each(run, trees, state)
    _write(flags, replace(loaded, variables=smaller), report)
    for line in _lines(report):
        say(line)
    return 0


def _check_whole(source: str, params: Any, *, is_run: bool) -> None:
    """Refuses a model whose kernels aren't whole: a share of it would be one of another model."""
    import jax

    from vision_jax.trees import factored, quantize

    if quantize.is_quantized(quantize.describe(params)) and not is_run:  # a run leaves floats
        raise UserError(
            f"{source} is a quantized model: factorize the float weights that it was made of, and "
            "quantize what comes out"
        )
    if factored.ranks_of(jax.eval_shape(factored.merge, params)):
        raise UserError(
            f"{source} is factored already: factorize the model that it was made of, by another "
            "--keep"
        )


def _told(path: str, layer: Any, rank: int) -> dict[str, Any]:
    """What the report says of a kernel; rank 0 stays whole."""
    return {
        "path": path,
        "shape": list(layer.shape),
        "rank": rank,
        PRODUCTS: [layer.cost(r) // layer.price * layer.rows for r in (0, rank)],
        "left_out": layer.spectrum.left_out(rank) ** 0.5 if rank else 0.0,
        "error_alone": layer.error_alone,
    }


def _write(flags: argparse.Namespace, loaded: Any, report: dict[str, Any]) -> None:
    import jax

    from vision_jax import convert
    from vision_jax.config import write_json
    from vision_jax.convert.quantized import write_quantized
    from vision_jax.figures import draw_ranks
    from vision_jax.models import families

    flags.to.mkdir(parents=True, exist_ok=True)
    write_quantized(
        flags.to / "model.safetensors",
        jax.device_get(loaded.variables),
        family=families.family_of(loaded.model),
        arguments=convert.arguments_of(loaded.model),
        preprocessing=asdict(loaded.preprocessing),
        class_names=loaded.class_names,
    )
    write_json(report, flags.to / "factorization.json")
    kernels = {one["path"]: (*one[PRODUCTS], one["rank"]) for one in report["kernels"]}
    draw_ranks(kernels, flags.to / "factorization.png")
    say(f"wrote {flags.to}: model.safetensors, factorization.json, factorization.png")


def _lines(report: dict[str, Any]) -> list[str]:
    """The report for the screen; prints its table."""
    from vision_jax.logging import print_table

    rows = []
    for one in report["kernels"]:
        before, after = one[PRODUCTS]
        shape, rank = str(one["shape"]), str(one["rank"] or "whole")
        rows.append((one["path"], shape, rank, f"{after / before:.3f}", f"{one['left_out']:.3f}"))
    print_table("Factors", COLUMNS, rows)
    lines = [
        f"{name} {report['before'][name]:,} -> {report['after'][name]:,} "
        f"({report['after'][name] / report['before'][name]:.3f})"
        for name in (PARAMETERS, PRODUCTS)
    ]
    for name, found in report.get("evaluation", {}).items():
        numbers = (
            f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}"
            for key, value in found.items()
        )
        lines.append(f"  {name:18}  {'  '.join(numbers)}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
