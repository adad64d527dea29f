"""Makes images by a trained generator, and says how good they are.

    vision_jax generate runs/generate_lora --count=64
    vision_jax generate runs/generate_embedded --classes=dress,coat --guidance=2 --seed=3
    vision_jax generate runs/generate_lora --images photo.png --strength=0.6
    vision_jax generate runs/generate_lora --images photo.png --mask=mask.png
    vision_jax generate runs/generate_lora --count=200 --measure --judge=runs/vit_lora \\
        --beside=embedded:fashion_generator
    vision_jax generate runs/mine --captions "a red bag" "two shoes"
    vision_jax generate hf://facebook/DiT-XL-2-256/transformer --allow-pickle \\
        --autoencoder=hf://stabilityai/sd-vae-ft-mse --classes=goldfish,360 --guidance=4

SOURCE is a run's folder, or weights as `predict --weights` takes them. --autoencoder names the
weights of an AutoencoderKL or AutoencoderTiny, where the generator makes latents of one. A model
of noise, a DiT, is sampled by DDIM, others by their flow. Written are the images, in a
folder for each class, OUT/samples.png with the first ones, and OUT/manifest.json, which says how
each was made. OUT is a data set of class folders: another run can train on it.

With --images they are made of these: --strength says how much of each is replaced by noise at
first. With --mask what is white in it is made anew, and all else stays to the pixel.

With --beside another generator, the base of an adapter, makes as many images, of all its classes
and of the same noise: OUT/beside.png shows both, and measures.json has the same figures of them.

With --measure OUT/measures.json says how near the images are to the run's held-out images, and
which are copies of training images. docs/generation.md says what the figures are.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vision_jax.commands.source import MODEL_FILE, RUN_FILE, check_folder, is_run, load_source
from vision_jax.errors import UserError, nearest, utf8
from vision_jax.files import expand
from vision_jax.flags import make_parser, run, seed

if TYPE_CHECKING:
    import numpy as np

    from vision_jax.data.sources import Source
    from vision_jax.generate.samples import Generator, Wanted
    from vision_jax.tasks.generation.autoencoder import Autoencoder

COUNT, BATCH = 64, 64
DRAWN = 64  # images in samples.png
DDIM_STEPS = 50
FEATURES = "embedded:vit_cifar10"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, or 2 for bad input."""
    return run(lambda: _run(_parse(arguments)), "such a model, or such a batch", at_once=False)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("vision_jax generate", __doc__)
    parser.add_argument("source", metavar="SOURCE", help="the generator")
    parser.add_argument("--count", type=int, help=f"of the images; {COUNT} by default")
    parser.add_argument(
        "--classes",
        default="",
        metavar="NAME,...",
        help="names or numbers of the images' classes, in turn; all by default",
    )
    parser.add_argument(
        "--captions",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="of the images, in turn, where captions were learned; or a file with one in each line",
    )
    parser.add_argument(
        "--autoencoder", default="", metavar="SOURCE", help="whose latents the generator makes"
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the noise")
    parser.add_argument("--method", choices=("heun", "euler", "ddim"), help="the run's else")
    parser.add_argument("--steps", type=int, help=f"the run's else; {DDIM_STEPS} of ddim")
    parser.add_argument("--guidance", type=float, help="1 for none; the run's else")
    parser.add_argument("--images", nargs="+", default=[], metavar="FILE", help="to begin with")
    parser.add_argument("--strength", type=float, help="of the noise in these, 0.6 by default")
    parser.add_argument("--mask", metavar="FILE", help="white where images are made anew")
    parser.add_argument("--measure", action="store_true", help="beside the run's images")
    parser.add_argument(
        "--features", default="", metavar="SOURCE", help=f"whose the figures are; {FEATURES}"
    )
    parser.add_argument("--judge", default="", metavar="SOURCE", help="a classifier of the classes")
    parser.add_argument(
        "--beside", default="", metavar="SOURCE", help="a generator to compare with: the base"
    )
    parser.add_argument("--batch-size", type=int, default=BATCH, help="images made at once")
    parser.add_argument("--out", type=expand, metavar="DIR", help="where; RUN/generated")
    parser.add_argument("--checkpoint", choices=("last", "best"), help="of a run; its end else")
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read pickles, by torch's weights-only reader"
    )
    flags = parser.parse_args(arguments)
    _check(flags)
    return flags


def _check(flags: argparse.Namespace) -> None:
    for name in ("count", "steps", "batch_size"):
        value = getattr(flags, name)
        if value is not None and not 1 <= value < 2**31:
            raise UserError(f"--{name.replace('_', '-')} {value}: give 1 or more")
    if flags.guidance is not None and not 0 < flags.guidance < float("inf"):
        raise UserError(f"--guidance {flags.guidance}: give a number above 0")
    if flags.strength is not None and not 0 < flags.strength <= 1:
        raise UserError(f"--strength {flags.strength}: give a share above 0, at most 1")
    if (flags.mask or flags.strength is not None) and not flags.images:
        raise UserError("--mask and --strength are of --images: name the files")
    if flags.mask and flags.strength is not None:
        raise UserError("--strength: with --mask what is white begins as noise: leave it out")
    if flags.images and flags.beside:
        raise UserError("--beside is of images made of noise: leave --images out")
    if flags.images and flags.measure:
        raise UserError("--measure is of images made of noise: leave --images out")
    if flags.captions and flags.classes:
        raise UserError("--captions and --classes: a generator has learned one of both")
    if (flags.features or flags.judge) and not flags.measure:
        raise UserError("--features and --judge go with --measure")


def _run(flags: argparse.Namespace) -> int:
    from vision_jax import machine
    from vision_jax.config import load_config

    machine.keep_compiled()
    folder = expand(flags.source)
    out = _find_out(flags, folder)
    own = load_config(str(folder / RUN_FILE), {}) if is_run(folder) else None
    if own is not None and own.task != "generation":
        raise UserError(
            f"{folder} is a run of task {own.task}, which makes no images: name another"
        )
    generator, origin = _load(flags, folder, own)
    other = _load_other(flags, generator) if flags.beside else None
    wanted = _wanted(flags, generator)
    measuring = _prepare_measures(flags, own, generator, wanted) if flags.measure else None
    made = _make(flags, generator, wanted, origin, out)
    before = [] if other is None else _make_before(flags, other, wanted, made, out)
    if measuring is not None:
        _measure(flags, measuring, wanted, made, before, out)
    return 0


def _find_out(flags: argparse.Namespace, folder: Path) -> Path:
    """The folder that is written to, which must be new or empty."""
    out = flags.out or (folder if is_run(folder) else Path()) / "generated"
    check_folder("--out", out)
    if out.is_dir() and any(out.iterdir()):
        raise UserError(
            f"--out: {out} is not empty, and images of two runs would mix: name another"
        )
    if flags.measure and not is_run(folder):
        raise UserError(f"--measure: {flags.source} is no run's folder, so there is no data of it")
    return out


# The generator ------------------------------------------------------------------------------------


def _load(flags: argparse.Namespace, folder: Path, own: Any) -> "tuple[Generator, dict[str, str]]":
    """(the generator, where it came from), of a run's folder with its config, or of weights."""
    from vision_jax.config import default_config
    from vision_jax.generate.samples import Generator, origin_of
    from vision_jax.logging import say
    from vision_jax.tasks.generation import task as generation
    from vision_jax.tasks.generation.autoencoder import check_fits

    loaded = load_source(
        flags.source, folder, checkpoint=flags.checkpoint, allow_pickle=flags.allow_pickle
    )
    for line in loaded.remarks or _began_with(folder, own):
        say(line)
    config = own or default_config("generation")
    autoencoder = _load_autoencoder(flags, folder, own)
    scales = None if autoencoder is None else autoencoder.scales
    task = generation.make_task(
        config, loaded.model, loaded.family.predicts, known=generation.SAMPLED, scales=scales
    )
    check_fits(autoencoder, loaded.model, "--autoencoder")
    sampling = generation.make_sampling(config, **_changed(flags, task.predicts))
    if autoencoder is not None:
        cells: Any = loaded.preprocessing
        loaded = replace(loaded, preprocessing=autoencoder.pixels(cells))
    names, embeddings = _captions(flags, folder, own, task) or (loaded.class_names, None)
    generator = Generator(
        loaded.model,
        loaded.variables,
        names,
        task,
        sampling,
        loaded.preprocess,
        autoencoder,
        embeddings,
    )
    origin = origin_of(loaded, folder if own else None, flags.checkpoint)
    return generator, origin | _origin_of_captions(own if task.captions else None)


def _load_other(flags: argparse.Namespace, generator: "Generator") -> "Generator":
    """What --beside names, which is given the same noise and sampled in the same way."""
    from vision_jax.logging import say
    from vision_jax.tasks.generation.task import SAMPLED

    path = expand(flags.beside)
    other = load_source(flags.beside, path, checkpoint=None, allow_pickle=flags.allow_pickle)
    for line in other.remarks:
        say(line)
    if getattr(other.model, "predicts", "") not in SAMPLED:
        raise UserError(f"--beside: {other.origin} makes no images: name the adapter's base")
    shapes = [(*m.image_size, m.in_channels) for m in (generator.model, other.model)]
    if shapes[0] != shapes[1]:
        height, width, channels = shapes[1]
        raise UserError(
            f"--beside: {other.origin} makes images of {height} x {width} and {channels} channels,"
            " which have other noise: name the base of the same adapter"
        )
    if other.model.caption_width != generator.model.caption_width:
        raise UserError(f"--beside: {other.origin} has not learned the same captions")
    if (other.model.predicts == "noise") != (generator.task.predicts == "noise"):
        raise UserError(f"--beside: {other.origin} is sampled otherwise: name the adapter's base")
    task = replace(
        generator.task, predicts=other.model.predicts, num_classes=other.model.num_classes
    )
    names = generator.names if task.captions else other.class_names
    named: Any = {"variables": other.variables, "names": names, "task": task}
    return replace(generator, model=other.model, **named)


def _began_with(folder: Path, own: Any) -> list[str]:
    """What a run's model was fine-tuned from, and the license of such weights."""
    from vision_jax.convert.tables import TABLES
    from vision_jax.run.description import load_description

    described = load_description(folder / MODEL_FILE) if own is not None else None
    if described is None or not described.weights:
        return []
    licenses = {table.license for table in TABLES if table.family == described.family} - {""}
    known = f" (license of published ones: {'; '.join(sorted(licenses))})" if licenses else ""
    return [f"the run began with {described.weights}{known}"]


def _load_autoencoder(flags: argparse.Namespace, folder: Path, own: Any) -> "Autoencoder | None":
    """The one that is named, or the run's, which must be the same as when it began."""
    from vision_jax import convert
    from vision_jax.logging import say
    from vision_jax.tasks.generation.autoencoder import read_autoencoder

    of_run = own.latents.autoencoder if own is not None else ""
    if not flags.autoencoder and not of_run:
        return None
    pickles = flags.allow_pickle or (own is not None and own.model.allow_pickle)
    found = read_autoencoder(
        flags.autoencoder or of_run, allow_pickle=pickles, field="--autoencoder"
    )
    if not flags.autoencoder:
        then = "name the autoencoder that it was trained with by --autoencoder"
        _check_same(folder, found.weights.origin, found.weights.sha256, then)
    for line in convert.remarks(found.weights):
        say(f"autoencoder: {line}")
    return found


def _captions(
    flags: argparse.Namespace, folder: Path, own: Any, task: Any
) -> "tuple[list[str], np.ndarray] | None":
    """(captions, f32[N, 2, E]: each one's embedding and that of none), or None for classes."""
    import numpy as np

    from vision_jax.tasks.generation.captions import NOTHING, read_tower

    if not task.captions:
        if flags.captions:
            raise UserError("--captions: this generator has learned classes: take --classes")
        return None
    if flags.classes or flags.judge:
        raise UserError("--classes and --judge: this generator has learned captions: take those")
    if own is None:
        raise UserError(f"{flags.source}: only a run says which tower reads its captions: name it")
    tower = read_tower(own.text.tower, own.text.tokenizer, allow_pickle=own.model.allow_pickle)
    for pair in tower.made_with:
        _check_same(folder, *pair, "put back what it was trained with")
    texts = _read_lines(flags.captions) or [NOTHING]
    found = tower.embed([*texts, NOTHING])
    return texts, np.stack([found[:-1], np.broadcast_to(found[-1], found[:-1].shape)], axis=1)


def _origin_of_captions(own: Any) -> dict[str, str]:
    """The tower and the tokenizer that read captions, for the manifest."""
    from vision_jax.tasks.generation.captions import read_tower

    if own is None:
        return {}
    tower = read_tower(own.text.tower, own.text.tokenizer, allow_pickle=own.model.allow_pickle)
    hashes = {"tower_sha256": tower.weights.sha256, "tokenizer_sha256": tower.sha256}
    return {"tower": tower.weights.origin, **hashes}


def _read_lines(given: Sequence[str]) -> list[str]:
    """The texts, or the lines of the file that is named."""
    if len(given) == 1 and expand(given[0]).is_file():
        from vision_jax.files import read_text
        from vision_jax.logging import say

        lines = [line.strip() for line in read_text(expand(given[0])).splitlines()]
        found = [line for line in lines if line]
        say(f"captions: {len(found)} of {expand(given[0])}")
        if not found:
            raise UserError(f"--captions: {given[0]} has no line of text: write one for each image")
        return found
    if len(given) == 1 and Path(given[0]).suffix == ".txt":
        raise UserError(f"--captions: {given[0]}: no such file")
    return list(given)


def _check_same(folder: Path, origin: str, sha256: str, then: str) -> None:
    """Raises UserError where what is around a run's model is another than when it began."""
    from vision_jax.run.description import load_description

    if dict(load_description(folder / MODEL_FILE).teachers).get(origin) != sha256:
        raise UserError(f"{origin} has changed since the run began: {then}")


def _changed(flags: argparse.Namespace, predicts: str) -> dict[str, Any]:
    """How images are made otherwise than the config says."""
    given = {"method": flags.method, "steps": flags.steps, "guidance": flags.guidance}
    if predicts == "noise":
        from vision_jax.ops import ddim

        if flags.method not in (None, "ddim"):
            raise UserError(f"--method {flags.method}: a model of noise is sampled by ddim")
        given |= {"method": "ddim", "steps": flags.steps or DDIM_STEPS}
        if given["steps"] > ddim.STEPS:
            raise UserError(f"--steps {flags.steps}: a model of noise has {ddim.STEPS}")
    elif flags.method == "ddim":
        raise UserError(f"--method ddim: this model predicts a {predicts}: take heun or euler")
    if flags.images and not flags.mask:
        given["strength"] = flags.strength or 0.6
    return {"seed": flags.seed, **{k: value for k, value in given.items() if value is not None}}


# What is wanted of it -----------------------------------------------------------------------------


def _wanted(flags: argparse.Namespace, generator: "Generator") -> "Wanted":
    """The classes in turn, and of files each one its own."""
    import numpy as np

    from vision_jax.generate.samples import Wanted

    labels = [_label(name, generator.names) for name in flags.classes.split(",") if name]
    labels = labels or list(range(len(generator.names)))
    labels = labels or [0]  # of a model without classes, whose label 0 says none
    images, fresh = _given(flags, generator) if flags.images else (None, None)
    count = flags.count or (COUNT if images is None else len(images))
    if images is not None:
        rows = np.arange(count) % len(images)
        images, fresh = images[rows], fresh if fresh is None else fresh[rows]
    turn = np.resize(np.asarray(labels, np.int32), count)
    return Wanted(turn, np.arange(count, dtype=np.int32), images, fresh)


def _label(name: str, names: Sequence[str]) -> int:
    """Of a class by its name, one of its synonyms ("tench, Tinca tinca"), or its number."""
    if name in names:
        return names.index(name)
    for label, synonyms in enumerate(names):
        if name.strip() in [one.strip() for one in synonyms.split(",")]:
            return label
    if not name.strip().isascii() or not name.strip().isdigit():
        hint = nearest(name, names) or f", only {', '.join(names[:20])}"
        raise UserError(f"--classes: no class {name!r}{hint}")
    if int(name) >= len(names):
        raise UserError(f"--classes: no class {name}: their numbers are 0 to {len(names) - 1}")
    return int(name)


def _given(
    flags: argparse.Namespace, generator: "Generator"
) -> "tuple[np.ndarray, np.ndarray | None]":
    """The files' images u8[N, H, W, C], and where they are made anew."""
    import numpy as np

    from vision_jax.commands.predict import image_files

    names = image_files(flags.images, "generate")
    images = np.round(255 * np.asarray(generator.preprocess(names))).astype(np.uint8)
    if not flags.mask:
        return images, None
    grey = np.asarray(generator.preprocess([flags.mask])).mean(-1, keepdims=True)  # [1, H, W, 1]
    return images, np.repeat(grey > 0.5, len(images), axis=0)


# Images and figures -------------------------------------------------------------------------------


def _make(
    flags: argparse.Namespace,
    generator: "Generator",
    wanted: "Wanted",
    origin: dict[str, str],
    out: Path,
) -> "list[np.ndarray]":
    """Makes and writes the images, the first ones' picture and the manifest.

    Returns them where they are measured, and else the first ones.
    """
    import numpy as np

    from vision_jax.config import write_json
    from vision_jax.generate import samples
    from vision_jax.logging import say

    paths = samples.sample_paths(wanted, generator.names)
    record = samples.manifest(generator, wanted, paths, origin)
    out.mkdir(parents=True, exist_ok=True)
    made: list[np.ndarray] = []
    written = 0
    for batch in _batches(flags, generator, wanted):
        samples.write_images(batch, paths[written : written + len(batch)], out)
        written += len(batch)
        made.extend(batch[: _kept(flags, wanted) - len(made)])
    say(f"wrote {written} images below {out}")
    write_json(record, out / "manifest.json")
    say(f"wrote {out / 'manifest.json'}: how each was made")
    say(f"wrote {samples.draw_grid(np.stack(made[:DRAWN]), out / 'samples.png')}: the first ones")
    return made


def _make_before(
    flags: argparse.Namespace,
    other: "Generator",
    wanted: "Wanted",
    made: "Sequence[np.ndarray]",
    out: Path,
) -> "list[np.ndarray]":
    """What another generator makes of the same noise, of all its classes."""
    import numpy as np

    from vision_jax.generate import samples
    from vision_jax.logging import say

    turn = np.resize(np.arange(max(len(other.names), 1), dtype=np.int32), len(wanted))
    asked = samples.Wanted(turn, wanted.index)
    before: list[np.ndarray] = []
    for batch in _batches(flags, other, asked):
        before.extend(batch[: _kept(flags, wanted) - len(before)])
    say(f"wrote {samples.draw_beside(before, made, out / 'beside.png')}: of the same noise")
    return before


def _kept(flags: argparse.Namespace, wanted: "Wanted") -> int:
    """How many images are held in memory: all that are measured, and else what is drawn."""
    return len(wanted) if flags.measure else DRAWN


def _batches(
    flags: argparse.Namespace, generator: "Generator", wanted: "Wanted"
) -> "Iterator[np.ndarray]":
    """Images u8[n, H, W, C], batch by batch, and a bar that says how far it is."""
    from vision_jax.generate.samples import make_images
    from vision_jax.logging import show_progress

    size = min(flags.batch_size, len(wanted))
    with show_progress(-(-len(wanted) // size)) as (advance, _):
        for batch in make_images(generator, wanted, size):
            yield batch
            advance()


@dataclass(frozen=True)
class _Measuring:
    """What images are measured by.

    Attributes:
      train, held_out: images of the run.
      rows: of these the ones of the classes that are asked for.
      features: images -> f32[N, D].
      distance: what the Fréchet distance of these features is called.
      judge: images -> labels, or None.
    """

    train: "Source"
    held_out: "Source"
    rows: "tuple[np.ndarray, ...]"
    features: "Callable[[Iterable[np.ndarray]], np.ndarray]"
    distance: str
    judge: "Callable[[Iterable[np.ndarray]], np.ndarray] | None"


def _prepare_measures(
    flags: argparse.Namespace, config: Any, generator: "Generator", wanted: "Wanted"
) -> _Measuring:
    """What is needed to measure; whatever is missing is said before an image is made."""
    import numpy as np

    from vision_jax.convert import read_weights
    from vision_jax.generate import measures
    from vision_jax.loaded import load
    from vision_jax.logging import say
    from vision_jax.ops.fidelity import NEIGHBORS
    from vision_jax.tasks.generation import task as generation

    if len(wanted) <= NEIGHBORS:
        raise UserError(
            f"--measure: {len(wanted)} images, and figures need more than {NEIGHBORS}: make more "
            "by --count"
        )
    train, held_out = generation.read_sources(config)
    asked = np.unique(wanted.labels)
    if generator.task.captions:  # images of all captions
        asked = np.unique([*train.labels, *held_out.labels])
    rows = tuple(np.flatnonzero(np.isin(source.labels, asked)) for source in (train, held_out))
    for kind, found in zip(("training", "held-out"), rows, strict=True):
        if len(found) <= NEIGHBORS:
            names = [*generator.names, "no class"]
            raise UserError(
                f"--measure: the run has {len(found)} {kind} images of "
                f"{', '.join(utf8(names[label]) for label in asked[:10])}, and figures need more "
                f"than {NEIGHBORS}: ask for other --classes"
            )
    model = load(flags.features or FEATURES, allow_pickle=flags.allow_pickle)
    distance = "frechet"
    if measures.is_inception(model):
        source = read_weights(flags.features, allow_pickle=flags.allow_pickle)
        distance = measures.distance_name(model, source.sha256)
        if distance != "fid":
            say(f"{flags.features} is not the published file of the FID: its distance is no FID")
    features = measures.make_features(model, generator.preprocess)
    judge = None
    if flags.judge:
        loaded = load(flags.judge, allow_pickle=flags.allow_pickle)
        judge = measures.make_judge(loaded, generator.names)
    return _Measuring(train, held_out, rows, features, distance, judge)


def _measure(
    flags: argparse.Namespace,
    measuring: _Measuring,
    wanted: "Wanted",
    made: "Sequence[np.ndarray]",
    before: "Sequence[np.ndarray]",
    out: Path,
) -> None:
    """Writes OUT/measures.json and OUT/nearest.png, beside the run's own images.

    Of what was made `before` by another generator there are the same figures, if there is any.
    """
    import numpy as np

    from vision_jax.config import write_json
    from vision_jax.generate import measures
    from vision_jax.logging import say

    features, distance, judge = measuring.features, measuring.distance, measuring.judge
    of_made = features(made)
    read: tuple[list[int], list[int]] = ([], [])  # rows of the run's images
    of_train, of_held_out = (
        features(_sound(source, rows, into))
        for source, rows, into in zip(
            (measuring.train, measuring.held_out), measuring.rows, read, strict=True
        )
    )
    found = measures.measure(of_made, of_held_out, of_train, distance)
    figures = {"features": flags.features or FEATURES, **found.figures}
    others = {"beside": flags.beside} if before else {}
    if before:
        others |= measures.measure(features(before), of_held_out, of_train, distance).figures
    if judge is not None:
        figures |= {"judge": flags.judge, "judged_right": _share(judge(made), wanted.labels)}
        if before:
            others["judged_right"] = _share(judge(before), wanted.labels)
    write_json({**figures, **({"beside": others} if others else {})}, out / "measures.json")
    for name, value in (*figures.items(), *others.items()):
        say(f"  {name:20} {value if isinstance(value, int | str) else f'{value:.4f}'}")
    if copies := figures["copies"]:
        say(
            f"warning: {copies} of {len(made)} images are nearer to a training image than held-out"
            " ones are: see nearest.png"
        )
    say(f"wrote {out / 'measures.json'}")
    closest = np.argsort(found.copies.distances, kind="stable")[: measures.SHOWN]
    beside = [measuring.train[read[0][found.copies.index[row]]]["image"] for row in closest]
    measures.draw_nearest([made[row] for row in closest], beside, out / "nearest.png")
    say(f"wrote {out / 'nearest.png'}: the nearest to training images")


def _sound(source: "Source", rows: "np.ndarray", into: list[int]) -> "Iterator[np.ndarray]":
    """The images of these rows that can be read, whose rows are noted; others are named."""
    from vision_jax.data.decode import DamagedImageError
    from vision_jax.logging import say

    for row in map(int, rows):
        try:
            image = source[row]["image"]
        except DamagedImageError as error:
            name = source.example_name(row)
            reason = str(error) if name in str(error) else f"{name}: {error}"
            say(f"warning: left out of the figures: {reason}")
            continue
        into.append(row)
        yield image


def _share(found: "np.ndarray", asked: "np.ndarray") -> float:
    """Of images that are taken for what was asked for."""
    return float((found == asked).mean())


if __name__ == "__main__":
    sys.exit(main())
