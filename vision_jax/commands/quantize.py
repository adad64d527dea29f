"""quantize: a finished run's model in 8 or 4 bits, and what that costs, layer by layer.

OUT/model.safetensors    int8 or 4 bits and all else in float, for `vision_jax.load`
OUT/quantization.json    bytes, errors, evaluations, each kernel
OUT/quantization.png     the error of each kernel alone
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from vision_jax import convert
from vision_jax.commands.source import check_keeps
from vision_jax.config import check_ranges, write_json
from vision_jax.convert.quantized import write_quantized
from vision_jax.errors import UserError
from vision_jax.logging import human_size, print_table, say
from vision_jax.run import calibrate
from vision_jax.run.prepare import Run
from vision_jax.run.restore import restore
from vision_jax.trees import factored, lora, paths, quantize
from vision_jax.trees.leaf import leaves

COLUMNS = ("kernel", "shape", "error alone", "")
SHOWN = 20  # kernels in the table
BY_RULE, BY_ERROR = "float: by rule", "float: too sensitive"
MILD = "int8 weights alone: too sensitive"


def run(config: ConfigDict, workdir: Path, checkpoint: str, out: Path | None) -> int:
    """Writes the quantized model and its report; returns the exit code.

    Raises:
      UserError: no such run, a task whose images it can't be measured on, or adapters that would be
        merged into 4 bits without being asked.
    """
    check_ranges(config)
    if "ptq" not in config:
        raise UserError(
            f"quantize is for classifiers, detectors and segmenters, and this is {config.task}"
        )
    out = out or workdir / "quantized"
    check_keeps("--out", out, workdir)
    restored = restore(config, workdir, checkpoint)
    prepared, (trained, frozen, model_state) = restored.run, restored.trained.arguments
    params = prepared.parameters.assemble({**trained, **frozen})
    _check_adapters(config, params)
    plain = jax.jit(factored.merge)(params)

    candidates = quantize.choose(plain, config.ptq.rules, field="config.ptq.rules")
    keep = (*config.ptq.keep, re.escape(getattr(prepared.model, "stem", "")))
    by_rule = paths.select(candidates, keep, field="config.ptq.keep", strict=False)
    batches = calibrate.read_batches(prepared, config.ptq.images)
    say(f"measured on {config.ptq.images} training images, {len(candidates)} kernels")
    everything = _quantize(prepared, plain, candidates, model_state, batches)
    milder = None
    if config.ptq.activations != "float":
        milder = jax.jit(partial(_in_int8, chosen=candidates, dynamic=False))(plain)
    error = calibrate.make_error(prepared, plain, everything, model_state, batches, milder)
    alone = {path: error({path}) for path in sorted(candidates)}
    free = {path: alone[path] for path in alone if path not in by_rule}
    mild, by_error = _choose(free, error, config.ptq.max_error, milder is not None)
    chosen = free.keys() - mild - by_error
    if not chosen and not mild:
        raise UserError(
            f"config.ptq.max_error {config.ptq.max_error}: with any kernel quantized the outputs "
            "are off by more: raise it, or take another form or activations"
        )
    quantized = quantize.only(plain, everything, chosen)
    if mild:
        quantized = quantize.only(quantized, milder, mild)

    kept = ((BY_RULE, by_rule), (MILD, mild), (BY_ERROR, by_error))
    report = {
        "run": str(workdir.absolute()),
        "form": config.ptq.form,
        "activations": config.ptq.activations,
        "images": config.ptq.images,
        "max_error": config.ptq.max_error,
        "error": error(chosen, mild),
        "error_without_exceptions": error(candidates),
        "bytes": {"float": _bytes(plain), "quantized": _bytes(quantized)},
        "evaluation": calibrate.evaluate_each(
            prepared,
            {"float": plain, "quantized": quantized, "without_exceptions": everything},
            model_state,
        ),
        "kernels": [
            {
                "path": path,
                "shape": list(leaves(plain)[path].shape),
                "error": alone[path],
                "kept": next((why for why, those in kept if path in those), ""),
            }
            for path in sorted(alone, key=lambda path: -alone[path])
        ],
    }
    if shares := _surviving(params, plain, quantized):
        report["adapters_survive"] = shares
    _write(prepared, out, quantized, model_state, report)
    for line in _lines(report):
        say(line)
    return 0


def _check_adapters(config: ConfigDict, params: Any) -> None:
    """Refuses to round what adapters learned to 4 bits, unless it is asked for."""
    if config.ptq.form == "nf4" and lora.adapter_paths(params) and not config.ptq.requantize:
        raise UserError(
            "config.ptq.form: this run trained adapters, and rounding the merged kernels to 4 bits "
            "takes back much of what they learned: take int8, keep WORKDIR/model.safetensors in "
            "float, or set --config.ptq.requantize=True, which says how much is left"
        )


def _choose(
    errors: Mapping[str, float], error: calibrate.Error, max_error: float, mildly: bool
) -> tuple[set[str], set[str]]:
    """Which kernels have int8 weights and inputs in float, and which are wholly in float.

    Args:
      errors: of each kernel, when it alone is quantized.
      error: of two sets of kernels, see `calibrate.make_error`.
      max_error: that all together may make.
      mildly: whether there are inputs to leave in float.
    """
    if not mildly:
        return set(), set(calibrate.choose_exceptions(errors, error, max_error))
    by_error: set[str] = set()
    if error((), errors) > max_error:
        alone = {path: error((), {path}) for path in errors}
        by_error |= {*calibrate.choose_exceptions(alone, lambda on: error((), on), max_error)}
    left = {path: errors[path] for path in errors if path not in by_error}
    mild = calibrate.choose_exceptions(left, lambda on: error(on, left.keys() - set(on)), max_error)
    return set(mild), by_error


def _in_int8(plain: Any, *, chosen: Collection[str], dynamic: bool) -> Any:
    return quantize.quantize(plain, chosen, partial(quantize.FORMS["int8"], dynamic=dynamic))


def _quantize(
    prepared: Run, plain: Any, chosen: Collection[str], model_state: Any, batches: Any
) -> Any:
    """The tree with all of the chosen kernels quantized as the config says."""
    config = prepared.config
    settings = config.ptq
    if settings.form == "nf4":
        if settings.activations != "float":
            raise UserError(
                "config.ptq.activations are of int8: set config.ptq.form=int8, or activations=float"
            )
        make = partial(quantize.FORMS["nf4"], block_size=settings.block_size)
        return jax.jit(lambda plain: quantize.quantize(plain, chosen, make))(plain)
    if settings.activations != "static":
        dynamic = settings.activations == "dynamic"
        return jax.jit(partial(_in_int8, chosen=chosen, dynamic=dynamic))(plain)
    found = calibrate.input_ranges(
        prepared, plain, model_state, batches, settings.observer, settings.percentile
    )
    return quantize.quantize_static(plain, chosen, calibrate.scales_of(found))


def _surviving(params: Any, plain: Any, quantized: Any) -> dict[str, float]:
    """Of each adapted kernel that is quantized, the share of its update that is left."""
    base, adapters = lora.detach(params)
    return {
        path: share
        for path, share in quantize.surviving_share(
            lora.merge(base), lora.merge(plain), lora.merge(quantized)
        ).items()
        if path in adapters
    }


def _bytes(tree: Any) -> int:
    return sum(array.nbytes for array in jax.tree.leaves(tree))


def _write(
    prepared: Run, out: Path, quantized: Any, model_state: Any, report: Mapping[str, Any]
) -> None:
    from vision_jax.figures import draw_errors  # matplotlib, only where something is drawn

    description = prepared.description
    variables = {"params": quantized, **({"batch_stats": model_state} if model_state else {})}
    out.mkdir(parents=True, exist_ok=True)
    write_quantized(
        out / "model.safetensors",
        jax.device_get(variables),
        family=description.family,
        arguments=convert.arguments_of(prepared.model),
        preprocessing=asdict(description.preprocessing),
        class_names=description.class_names,
    )
    write_json(report, out / "quantization.json")
    kernels = {one["path"]: (one["error"], one["kept"]) for one in report["kernels"]}
    draw_errors(kernels, out / "quantization.png")
    say(f"wrote {out}: model.safetensors, quantization.json, quantization.png")


def _lines(report: Mapping[str, Any]) -> list[str]:
    """The report for the screen; prints its table."""
    rows = [
        (one["path"], str(one["shape"]), f"{one['error']:.2e}", one["kept"] or report["form"])
        for one in report["kernels"][:SHOWN]
    ]
    print_table("The most sensitive kernels", COLUMNS, rows)
    sizes = report["bytes"]
    lines = [
        f"bytes: {human_size(sizes['quantized'])} of {human_size(sizes['float'])} "
        f"({sizes['quantized'] / sizes['float']:.3f})",
        f"error of the outputs: {report['error']:.2e}; with all kernels quantized "
        f"{report['error_without_exceptions']:.2e}",
    ]
    for name, found in report["evaluation"].items():
        numbers = "  ".join(
            f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}"
            for key, value in found.items()
        )
        lines.append(f"  {name.replace('_', ' '):18}  {numbers}")
    if shares := report.get("adapters_survive"):
        mean = sum(shares.values()) / len(shares)
        lines.append(
            f"of the adapters' updates {mean:.1%} survive the rounding, least of "
            f"{min(shares, key=lambda path: shares[path])}: {min(shares.values()):.1%}"
        )
    return lines
