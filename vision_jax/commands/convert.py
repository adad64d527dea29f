"""Converts weights into a folder that timm, torchvision or transformers load strictly.

    python -m vision_jax.convert model.safetensors --out=DIR
    python -m vision_jax.convert hf://microsoft/resnet-50 --out=DIR --to=torchvision
    python -m vision_jax.convert timm://resnet50.a1_in1k --out=DIR --to=transformers
    python -m vision_jax.convert torchvision://swin_t --out=DIR
    python -m vision_jax.convert detr-r50-e632da11.pth --allow-pickle --out=DIR --to=transformers
    python -m vision_jax.convert runs/vit_lora --out=DIR --to=transformers
    python -m vision_jax.convert runs/mae_embedded --out=DIR --to=transformers --family=mae
    python -m vision_jax.convert checkpoint.pth --allow-pickle --dry-run

SOURCE is a file (.safetensors, .npz; .pth, .pt, .bin, .ckpt with --allow-pickle), a folder in
Hugging Face's layout, the folder of a run of vision_jax (adapters are merged), hf://owner/name,
timm://NAME[.TAG] or torchvision://BUILDER[@WEIGHTS]. Architecture and source are recognized by the
tensors' names and shapes. vision_jax itself reads the result too, as config.model.weights.
"""

import argparse
import dataclasses
import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vision_jax.errors import UserError
from vision_jax.files import draft_folder
from vision_jax.flags import make_parser, run

TARGETS = (
    *("timm", "torchvision", "transformers", "npz", "detr", "yolox", "nanodet", "smp"),
    *("diffusers", "dit", "fid"),
)
TAKEN_SIZE = (224, 224)  # pixels, to build a model whose parameters don't depend on it


@dataclass(frozen=True)
class Model:
    """What is converted.

    Attributes:
      params: arrays by path, statistics among them; read when asked for.
      family: the architecture.
      arguments: all of the model's.
      class_names: by label, where known.
      preprocessing: complete, or None where nothing is known of it.
      recognized: for people: what the source was found to be.
      remarks: for people: what was assumed, and what of the config was ignored.
    """

    params: Mapping[str, Any]
    family: str
    arguments: dict[str, Any]
    class_names: Sequence[str] | None
    preprocessing: Mapping[str, Any] | None
    recognized: str
    remarks: Sequence[str] = ()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for bad input, 128 + n after signal n."""
    return run(lambda: _run(_parse(arguments)), "such tensors; is the file damaged?")


def _stop(number: int, frame: Any) -> None:
    raise KeyboardInterrupt(number)  # so that what was begun is removed


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("python -m vision_jax.convert", __doc__)
    parser.add_argument("source", metavar="SOURCE", help="what to convert")
    parser.add_argument("--out", type=Path, metavar="DIR", help="a new or empty folder")
    parser.add_argument(
        "--to",
        choices=TARGETS,
        help="whose naming and config; by default timm's, transformers' for what timm hasn't, and "
        "a generator's own",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="recognize and check everything, write nothing"
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read pickles too, by torch's weights-only reader, which runs no code in them",
    )
    parser.add_argument(
        "--drop",
        action="append",
        default=[],
        metavar="REGEX",
        help="leave out tensors whose whole name matches, a loss's beside the model's, say",
    )
    parser.add_argument(
        "--checkpoint",
        choices=("last", "best"),
        help="of a run: this checkpoint instead of the model that its end wrote",
    )
    parser.add_argument(
        "--family",
        default="",
        metavar="NAME",
        help="what to take a file for that could be several: mae keeps an MAE's decoder, which is "
        "left out otherwise",
    )
    parser.add_argument(
        "--shard-gb",
        type=float,
        metavar="N",
        help="for transformers: files of at most N GB and their index, instead of one file",
    )
    flags = parser.parse_args(arguments)
    if flags.out is None and not flags.dry_run:
        raise UserError("--out=DIR is missing: where to write; or --dry-run, to write nothing")
    if flags.shard_gb is not None and not flags.shard_gb > 0:
        raise UserError(f"--shard-gb={flags.shard_gb:g} is no size of a file")
    return flags


def _run(flags: argparse.Namespace) -> int:
    from vision_jax.convert.package import crop_note, merging_note
    from vision_jax.convert.tables import own_naming, table_for_export

    if flags.out is not None:
        _check_free(flags.out)
    model = read_model(flags.source, flags.allow_pickle, flags.checkpoint, flags.drop, flags.family)
    if flags.family and model.family != flags.family:
        raise UserError(f"--family={flags.family}: {flags.source} is a {model.family}")
    print(model.recognized, flush=True)
    for remark in model.remarks:
        print(remark)
    to = flags.to or own_naming(model.family)
    if flags.dry_run:
        table_for_export(to, model.family, model.arguments).config(model.arguments)
        print("wrote nothing (--dry-run)")
        return 0
    limit = None if flags.shard_gb is None else int(flags.shard_gb * 1e9)
    for path in write_model(model, flags.out, to, limit):
        print(f"wrote {path} ({_size(path.stat().st_size)})")
    for note in (crop_note(model.preprocessing, to), merging_note(model.arguments, to)):
        if note:
            print(note)
    return 0


def _check_free(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out: {out} is there already: name a new or an empty folder")


def read_model(
    source: str,
    allow_pickle: bool,
    checkpoint: str | None,
    dropped: Sequence[str] = (),
    family: str = "",
) -> Model:
    """Reads and checks everything but the values.

    Args:
      source: as on the command line.
      allow_pickle: read pickles too.
      checkpoint: "last" or "best" of a run's folder; None for the model that it wrote at its end.
      dropped: regular expressions of tensors to leave out.
      family: what to take the source for, where it could be more than one.

    Raises:
      UserError: nothing there, damaged, not known, or not wholly this model's.
    """
    from vision_jax.convert.read import RUN_FILE, WEIGHTS_FILE, read_weights

    folder = Path(source).expanduser()
    is_run = (folder / RUN_FILE).is_file()
    if checkpoint and not is_run:
        raise UserError(f"--checkpoint is of the folder of a run, and {source} is none")
    if is_run and (checkpoint or not (folder / WEIGHTS_FILE).is_file()):
        return _from_checkpoint(folder, checkpoint or "last", family)
    return _from_weights(
        read_weights(
            source, allow_pickle=allow_pickle, dropped=dropped, field="--drop", family=family
        )
    )


def _from_weights(weights: Any) -> Model:
    from vision_jax import convert
    from vision_jax.convert.load import import_lazily, table_of
    from vision_jax.convert.package import preprocessing_of
    from vision_jax.models.families import FAMILIES, GENERATION

    family, arguments = convert.recognize(weights)
    table = table_of(weights)
    own = weights.preprocessing or {}
    size = arguments.get("image_size") or own.get("image_size") or TAKEN_SIZE
    target, arguments = _target(weights.origin, family, arguments, size)
    params = import_lazily(weights, target, arguments)
    left_out = sum(
        any(re.fullmatch(rule, name) for rule in table.dropped) for name in weights.tensors
    )
    consumed = len(weights.tensors) - left_out
    generates = FAMILIES[family].task == GENERATION
    ours = "vision_jax" in weights.metadata and not table.holds(arguments)
    whose = "vision_jax's own" if ours else f"{table.source}"
    dropped = f", {left_out} of no use here left out" if left_out else ""
    return Model(
        params,
        family,
        arguments,
        _class_names(weights, arguments["num_classes"]),
        None if generates else preprocessing_of(arguments, weights.preprocessing),
        f"{weights.origin}: {whose} {family} ({'no library has it' if ours else table.kind}; "
        f"{_differing(family, arguments)}): {consumed} tensors consumed{dropped}, "
        f"{len(params)} parameters filled",
        convert.remarks(weights),
    )


def _class_names(weights: Any, num_classes: int) -> list[str] | None:
    """As many as the head has outputs; a bare model has none, whatever its config says."""
    from vision_jax import convert

    names = convert.class_names_of(weights)
    if names and num_classes and len(names) != num_classes:
        raise UserError(
            f"{weights.origin}: its config or header names {len(names)} classes, and its head has "
            f"{num_classes}: mend the names there or take them out"
        )
    return names if num_classes else None


def _target(
    origin: str, family: str, arguments: Mapping[str, Any], image_size: Sequence[int]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(path -> ShapeDtypeStruct of each parameter and statistic, all arguments of the model)."""
    import jax
    import jax.numpy as jnp

    from vision_jax import convert
    from vision_jax.models.families import build_model
    from vision_jax.trees import paths

    try:
        model = build_model(family, **arguments)
        images = (1, *image_size, arguments["in_channels"])
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(images)))
    except UserError:
        raise
    except Exception as error:  # sizes that don't fit each other fail anywhere in the model
        reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        raise UserError(f"{origin}: its config or header makes no {family} ({reason})") from None
    flat = {path: leaf for tree in shapes.values() for path, leaf in paths.flatten(tree).items()}
    return flat, convert.arguments_of(model)


def _from_checkpoint(workdir: Path, checkpoint: str, wanted: str) -> Model:
    """A checkpoint of a run, adapters merged, averaged where the run averages.

    Of an MAE or a self-distilled model the ViT alone, unless `wanted` is its family.
    """
    import jax

    from vision_jax import convert
    from vision_jax.config import load_config
    from vision_jax.models.families import FAMILIES
    from vision_jax.run.restore import restore
    from vision_jax.trees import lora, paths

    if not (workdir / "config.json").is_file():
        raise UserError(f"{workdir} holds no run: there is no config.json in it")
    config = load_config(str(workdir / "config.json"), {})
    trained = restore(config, workdir, checkpoint)
    description = trained.run.description
    trainable, frozen, model_state = jax.device_get(trained.trained.arguments)
    params = lora.merge(trained.run.parameters.assemble({**trainable, **frozen}))
    flat = {**paths.flatten(params), **paths.flatten(model_state)}
    family, arguments = description.family, convert.arguments_of(trained.run.model)
    inside = FAMILIES[family].wraps
    whole = getattr(trained.run.model, "exported_whole", False)
    if inside and wanted != family and not whole:
        family, known = inside, FAMILIES[inside].arguments
        arguments = {name: value for name, value in arguments.items() if name in known}
        added = trained.run.model.added
        flat = {path: x for path, x in flat.items() if not path.startswith(added)}
    return Model(
        flat,
        family,
        arguments,
        description.class_names,
        dataclasses.asdict(description.preprocessing),
        f"{workdir}: {checkpoint} checkpoint, step {int(trained.state.step)}, of a run of "
        f"vision_jax: {family} ({_differing(family, arguments)}): "
        f"{len(flat)} parameters",
    )


def write_model(model: Model, out: Path, to: str, shard_bytes: int | None = None) -> list[Path]:
    """Writes the folder, whole or not at all; returns the files.

    Raises:
      UserError: the library has no such model or preprocessing, or the folder cannot be written.
    """
    from vision_jax.convert.package import write_package

    _check_free(out)
    place = out.resolve()  # a link stays
    place.parent.mkdir(parents=True, exist_ok=True)
    with draft_folder(place) as draft:
        files = write_package(
            draft,
            model.params,
            model.family,
            model.arguments,
            to=to,
            class_names=model.class_names,
            preprocessing=model.preprocessing,
            shard_bytes=shard_bytes,
        )
        draft.replace(place)
    return [out / path.name for path in files]


def _differing(family: str, arguments: Mapping[str, Any]) -> str:
    """The arguments that are not the family's defaults, in short."""
    from vision_jax.models.families import FAMILIES, RUN_ARGUMENTS

    defaults = FAMILIES[family].defaults
    told = {
        name: value
        for name, value in arguments.items()
        if name not in RUN_ARGUMENTS and (name not in defaults or defaults[name] != value)
    }
    return ", ".join(f"{name}={_short(value)}" for name, value in told.items())


def _short(value: Any) -> str:
    return str(value).replace(" ", "") if isinstance(value, tuple) else str(value)


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count} bytes"


def command() -> int:
    """The process's whole life: `main`, and what a signal leaves behind is removed."""
    for name in ("SIGTERM", "SIGHUP"):  # the latter is not everywhere
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _stop)
    return main()
