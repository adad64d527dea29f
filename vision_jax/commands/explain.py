"""Shows what a model looks at, by several methods, and measures how far to trust each.

    vision_jax explain runs/vit_lora --images cat.jpg dog.png
    vision_jax explain embedded:vit_cifar10 --images photos --methods grad_cam,rise --class=ship
    vision_jax explain runs/vit_lora --dataset
    vision_jax explain embedded:vit_cifar10 --dataset=path/to/class_folders --limit=100
    vision_jax explain runs/vit_lora --images cat.jpg --prototypes=5 --attack=8/255
    vision_jax explain embedded:nanodet_coco --images street.jpg --class=person --most=3
    vision_jax explain runs/detr_finetune --dataset

SOURCE is a run's folder, or weights as `predict --weights` takes them. Written are a picture of
each image, OUT/explanations.json with all figures, and OUT/explanations.html, a page by itself to
compare the methods on. Of a detector each box is explained, of a segmenter each region. With
--dataset the page has what the model looks at in each class, and its most confident errors; maps of
boxes and regions are measured by the true ones. With --prototypes it has the training images that a
classifier finds most like an image. docs/explanations.md says what the methods and the figures are.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vision_jax.commands.source import RUN_FILE, check_folder, is_run, load_source
from vision_jax.errors import UserError, nearest
from vision_jax.files import expand
from vision_jax.flags import make_parser, run, seed

if TYPE_CHECKING:
    from vision_jax.data.sources import Source
    from vision_jax.explain.classes import Subject

PARTS = ("detection", "segmentation")  # tasks whose models find boxes or regions
LIMIT = 200  # images of a data set
MOST = 50  # parts of an image
OF_RUN = "the run's"  # --dataset without a value


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, or 2 for bad input."""
    return run(lambda: _run(_parse(arguments)), "such a model", at_once=False)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("vision_jax explain", __doc__)
    parser.add_argument("source", metavar="SOURCE", help="the model")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--images", nargs="+", default=[], metavar="FILE", help="image files, or folders of them"
    )
    what.add_argument(
        "--dataset",
        nargs="?",
        const=OF_RUN,
        metavar="DATA",
        help="a data set as config.data.eval takes it; a run's own evaluation data without a value",
    )
    parser.add_argument(
        "--methods",
        default="",
        metavar="NAME,...",
        help="of a classifier all that fit the model for --images, integrated_gradients for "
        "--dataset; of others the fast ones, or all",
    )
    parser.add_argument(
        "--class", dest="label", metavar="NAME", help="explained; what the model finds else"
    )
    parser.add_argument(
        "--most", type=int, metavar="N", help="boxes or regions of an image, the surest; 5 else"
    )
    parser.add_argument(
        "--least-score", type=float, metavar="SCORE", help="of a box or a region; 0.3 else"
    )
    parser.add_argument("--limit", type=int, metavar="N", help=f"of --dataset; {LIMIT} by default")
    parser.add_argument(
        "--baseline",
        choices=("mean", "black", "blurred"),
        default="mean",
        help="the image without anything to see: the mean color, black, or the image blurred",
    )
    parser.add_argument(
        "--prototypes",
        type=int,
        default=0,
        metavar="N",
        help="show the N nearest training images of each, and the nearest of N classes",
    )
    parser.add_argument(
        "--train",
        metavar="DATA",
        help="the training images, as config.data.train takes them; a run's own by default",
    )
    parser.add_argument(
        "--attack",
        type=_epsilon,
        default=0.0,
        metavar="EPSILON",
        help="explain each image's adversarial example, too: PGD in this radius, such as 8/255; "
        "the picture shown is rounded to 8 bits, what is said is of the example before",
    )
    parser.add_argument(
        "--out", type=expand, metavar="DIR", help="where; RUN/explanations, or ./explanations"
    )
    parser.add_argument("--checkpoint", choices=("last", "best"), help="of a run; its end else")
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read pickles, by torch's weights-only reader"
    )
    parser.add_argument("--seed", type=seed, default=0, help="of all that is drawn")
    flags = parser.parse_args(arguments)
    if flags.limit is not None and (flags.dataset is None or flags.limit < 1):
        raise UserError("--limit: give 1 or more, with --dataset")
    if flags.prototypes < 0 or (flags.train is not None and not flags.prototypes):
        raise UserError("--prototypes: give 1 or more; --train goes with it")
    if flags.most is not None and not 1 <= flags.most <= MOST:
        raise UserError(f"--most: give 1 to {MOST}, whose maps are held together")
    if flags.least_score is not None and not 0 <= flags.least_score <= 1:
        raise UserError("--least-score: give 0 to 1")
    if flags.attack and flags.dataset is not None:
        raise UserError("--attack goes with --images; `robustness` attacks a data set")
    return flags


def _run(flags: argparse.Namespace) -> int:
    from vision_jax import machine

    machine.keep_compiled()
    folder = expand(flags.source)
    out = flags.out or (folder if is_run(folder) else Path()) / "explanations"
    check_folder("--out", out)
    loaded = load_source(
        flags.source, folder, checkpoint=flags.checkpoint, allow_pickle=flags.allow_pickle
    )
    from vision_jax.explain.classes import Subject

    subject = Subject(
        loaded.model, loaded.variables, loaded.class_names, loaded.preprocessing, loaded.origin
    )
    explain = _of_parts if loaded.family.task in PARTS else _of_classes
    asked = [name for name in flags.methods.split(",") if name]
    explain(flags, subject, _label(subject, flags.label), asked, folder, out)
    return 0


def _of_classes(
    flags: argparse.Namespace,
    subject: "Subject",
    label: int | None,
    asked: Sequence[str],
    folder: Path,
    out: Path,
) -> None:
    """Of classifiers."""
    from vision_jax.explain import classes, dataset, prototypes

    for flag in ("most", "least_score"):
        if getattr(flags, flag) is not None:
            name = flag.replace("_", "-")
            raise UserError(f"--{name} is of the boxes and regions of detectors and segmenters")
    if label is not None and flags.dataset is not None:
        raise UserError("--class goes with --images: of a data set each image has its own class")
    methods = classes.choose_methods(
        subject, asked or ([] if flags.images else ["integrated_gradients"])
    )
    if flags.images:
        from vision_jax.tasks.images import source_of

        source = source_of(_files(flags))
        explain: Any = partial(classes.explain_images, label=label, epsilon=flags.attack)
    else:
        from vision_jax.data.sources import read_source, subset

        if flags.dataset == OF_RUN:
            source = _own_data(flags, folder, subject)
        else:
            source = read_source(flags.dataset, class_names=subject.class_names)
        source = subset(source, min(flags.limit or LIMIT, len(source)), flags.seed)
        explain = dataset.explain_dataset
    train = _training_images(flags, folder, subject) if flags.prototypes else None
    out.mkdir(parents=True, exist_ok=True)
    near = train and prototypes.make_prototypes(
        subject.model,
        subject.variables,
        train,
        subject.preprocessing,
        folder if is_run(folder) and os.access(folder, os.W_OK) else out,
        count=flags.prototypes,
    )
    chosen = {"seed": flags.seed, "prototypes": near, "baseline": flags.baseline}
    explain(subject, source, methods, out, **chosen)


def _of_parts(
    flags: argparse.Namespace,
    subject: "Subject",
    label: int | None,
    asked: Sequence[str],
    folder: Path,
    out: Path,
) -> None:
    """Of detectors and segmenters."""
    from vision_jax.explain import found, part_sources, parts

    if flags.prototypes:
        raise UserError("--prototypes are of classifiers: they compare whole images")
    if flags.attack or flags.baseline != "mean":
        raise UserError("--attack and --baseline are of classifiers")
    methods = parts.choose_methods(subject.model, asked)
    given = {"most": flags.most, "least": flags.least_score, "label": label}
    wanted = parts.Wanted(**{name: value for name, value in given.items() if value is not None})
    if flags.images:
        source = part_sources.source_of(subject, _files(flags))
        explain = found.explain_images
    else:
        if flags.dataset == OF_RUN:
            source = _own_data(flags, folder, subject)
        else:
            source = part_sources.read_source(subject, flags.dataset)
        source = part_sources.part_of_source(source, flags.limit or LIMIT, flags.seed)
        explain = found.explain_dataset
    out.mkdir(parents=True, exist_ok=True)
    explain(subject, source, methods, out, wanted=wanted, seed=flags.seed)


def _files(flags: argparse.Namespace) -> list[str]:
    from vision_jax.commands.predict import image_files

    return image_files(flags.images, "explain")


def _epsilon(text: str) -> float:
    """The radius of a ball, in units of the pixels: 8/255, or 0.03."""
    above, _, below = text.partition("/")
    try:
        value = float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        value = -1
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no radius in (0, 1], such as 8/255")
    return value


def _label(subject: "Subject", name: str | None) -> int | None:
    """The label of a class's name."""
    if name is None:
        return None
    if name not in subject.class_names:
        raise UserError(f"--class: no class {name!r}{nearest(name, subject.class_names)}")
    return subject.class_names.index(name)


def _own_data(flags: argparse.Namespace, folder: Path, subject: "Subject") -> Any:
    """A run's evaluation data.

    Raises:
      UserError: no run.
    """
    from vision_jax.config import load_config
    from vision_jax.tasks.api import find_task

    if not is_run(folder):
        raise UserError(f"--dataset=DATA: {flags.source} is no run's folder, name the data")
    config = load_config(str(folder / RUN_FILE), {})
    return find_task(config.task).read_eval_source(config, subject.class_names)


def _training_images(flags: argparse.Namespace, folder: Path, subject: "Subject") -> "Source":
    """What the model was trained on."""
    from vision_jax.config import load_config
    from vision_jax.data.fingerprint import read_fingerprint
    from vision_jax.data.sources import read_source
    from vision_jax.explain.trained import trained_on
    from vision_jax.logging import say
    from vision_jax.run.workdirs import DATA_FILE

    if flags.train is not None:
        return read_source(flags.train, class_names=subject.class_names)
    if not is_run(folder):
        raise UserError(f"--train=DATA: {flags.source} is no run's folder, name the training data")
    before = read_fingerprint(folder / DATA_FILE)
    if before is None:
        raise UserError(
            f"{folder / DATA_FILE} is not there, which says what the run was trained on: name the "
            "training data with --train=DATA"
        )
    config = load_config(str(folder / RUN_FILE), {})
    source, changes = trained_on(read_source(config.data.train), subject.class_names, before)
    if changes:
        say(
            f"warning: {source.name} has changed since the run began: {changes}. The nearest are "
            "of those of its training images that are left, as they are today"
        )
    return source


if __name__ == "__main__":
    sys.exit(main())
