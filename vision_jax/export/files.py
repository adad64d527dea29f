"""An exported file with its description beside it: written, certified, and named by the verdict.

OUT/model.stablehlo, model.onnx, model.tflite, model.xml with model.bin
OUT/model.SUFFIX.json    inputs, outputs, class names, preprocessing, and the certificate
OUT/*.failed             both, where the certificate failed; what stood there stays
"""

import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

import vision_jax
from vision_jax.data.decode import MAX_PIXELS
from vision_jax.errors import UserError, utf8
from vision_jax.export import certificate, litert, onnx_file, openvino_file, stablehlo
from vision_jax.export.certificate import Ran, RunFailedError
from vision_jax.export.serving import Serving, serving_function
from vision_jax.files import own_draft_folder, write_whole
from vision_jax.limits import SIDE
from vision_jax.loaded import Loaded
from vision_jax.trees import factored

FAILED = ".failed"  # after the names of files whose certificate failed
SIZES = 3  # of the generated images; JAX compiles once for each
# (the model, images at once or None, folder) -> (the file in it, what its description says)
Write = Callable[[Serving, int | None, Path], tuple[Path, dict[str, Any]]]


@dataclass(frozen=True)
class Format:
    """A format of files.

    Attributes:
      write: what writes one.
      any_size: whether its images may be of any size, and as many at once as one likes.
      integers: whether it writes products of int8 as the model has them; else it stores kernels in
        int8 and its runtime knows what to do with them.
    """

    write: Write
    any_size: bool
    integers: bool = True


def check_installed(packages: Sequence[str], extra: str) -> None:
    """Raises UserError where one of the packages of an extra is missing."""
    for package in packages:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise UserError(f"{package} is missing: pip install 'vision_jax[{extra}]'") from None


def _write_stablehlo(serving: Serving, batch: int | None, folder: Path) -> tuple[Path, Any]:
    content, about = stablehlo.write(serving, batch)
    path = folder / "model.stablehlo"
    path.write_bytes(content)
    return path, about


def _write_tflite(serving: Serving, batch: int | None, folder: Path) -> tuple[Path, Any]:
    check_installed(("litert-converter",), "litert")
    content, about = litert.write(serving, batch or 1)
    path = folder / "model.tflite"
    path.write_bytes(content)
    return path, about


def _write_onnx(serving: Serving, batch: int | None, folder: Path) -> tuple[Path, Any]:
    check_installed(("onnx",), "onnx")
    content, about = onnx_file.write(serving, batch)
    path = folder / "model.onnx"
    path.write_bytes(content)
    return path, about


def _write_openvino(serving: Serving, batch: int | None, folder: Path) -> tuple[Path, Any]:
    check_installed(("onnx", "openvino"), "openvino")
    return openvino_file.write(serving, batch or 1, folder)


FORMATS: dict[str, Format] = {
    "stablehlo": Format(_write_stablehlo, any_size=True),
    "onnx": Format(_write_onnx, any_size=True),
    "tflite": Format(_write_tflite, any_size=False, integers=False),
    "openvino": Format(_write_openvino, any_size=False),
}


@dataclass(frozen=True)
class Request:
    """What a person asks of an export.

    Attributes:
      format: a key of FORMATS.
      image_size: (height, width) of the images that will come; None: any, where the format can.
      batch: images at once; None: any number, where the format can.
      photos: u8[1, H, W, C], on which the certificate is made beside generated images.
      count: of the generated images.
      python: whose packages run the file.
      seed: of the generated images.
      continues: what the certificate continues: where the weights came from, and how that import
        was proven.
      float32: the model before it was quantized, if it is known.
    """

    format: str
    image_size: tuple[int, int] | None = None
    batch: int | None = None
    photos: Sequence[np.ndarray] = ()
    count: int = 8
    python: str = sys.executable
    seed: int = 0
    continues: Mapping[str, Any] | None = None
    float32: Loaded | None = None


def export(loaded: Loaded, out: Path, request: Request) -> tuple[Path, dict[str, Any]]:
    """Writes OUT/model.SUFFIX and certifies it; returns (the file, what its JSON says).

    Args:
      loaded: the model.
      out: a folder, made if it is not there.
      request: what is asked for.

    Raises:
      UserError: a format that the model, or what is installed, cannot be written in.
    """
    format_ = FORMATS[request.format]
    loaded = certificate.as_float32(loaded)
    if not format_.any_size:
        request = replace(request, batch=request.batch or 1)
    size = _image_size(loaded, request, format_)
    serving = serving_function(loaded, image_size=size, integers=format_.integers)
    check_pixels(serving.image_size or loaded.preprocessing.image_size, request.batch)
    if serving.image_size is None and loaded.preprocessing.interpolation == "nearest":
        raise UserError(
            f"{loaded.origin}: its images are resized by the nearest pixel, which Pillow finds by "
            "adding up steps, and a file of any size can't: give --image-size"
        )
    out.mkdir(parents=True, exist_ok=True)
    with own_draft_folder(out / "model") as folder:
        path, about = format_.write(serving, request.batch, folder)
        record = _describe(loaded, serving, request, path) | {"written": about}
        record["certificate"] = certify(loaded, serving, request, path, folder)
        return _place(folder, path, out, record), record


def check_pixels(image_size: tuple[int, int], batch: int | None) -> None:
    """Raises UserError for images of more pixels, all at once, than any that this package reads."""
    (height, width), count = image_size, batch or 1
    if max(height, width) > SIDE or height * width * count > MAX_PIXELS:
        raise UserError(
            f"{count} x {height} x {width} pixels at once: a side has at most {SIDE:,}, and a "
            f"batch {MAX_PIXELS:,} in all: lower --image-size or --batch"
        )


def _image_size(loaded: Loaded, request: Request, format_: Format) -> tuple[int, int] | None:
    if request.image_size is not None or format_.any_size:
        return request.image_size
    return loaded.preprocessing.image_size


def _describe(loaded: Loaded, serving: Serving, request: Request, path: Path) -> dict[str, Any]:
    images = serving.images_spec(request.batch)
    return {
        "file": path.name,
        "format": request.format,
        "bytes": file_bytes(path),
        "sha256": _sha256(path),
        # OpenVINO's weights.
        "beside": {file.name: _sha256(file) for file in _parts(path) if file != path},
        "kind": serving.kind,
        "inputs": {"images": f"u8[{', '.join(map(str, images.shape))}], RGB for 3 channels"},
        "outputs": dict(serving.outputs),
        "class_names": [utf8(name) for name in serving.class_names],
        "preprocessing": asdict(loaded.preprocessing),
        "versions": {"vision_jax": vision_jax.__version__}
        | {name: importlib.metadata.version(name) for name in ("jax", "numpy", "pillow")},
    }


def certify(
    loaded: Loaded, serving: Serving, request: Request, path: Path, folder: Path
) -> dict[str, Any]:
    """What the file computes beside the model, on generated images and on the person's photos.

    Args:
      loaded: the model, in float32.
      serving: of it, which the file was written of.
      request: what was asked for.
      path: of the file.
      folder: for more files, of no use later.
    """
    rng = np.random.default_rng(request.seed)
    images = _images(loaded, serving, request, rng)
    found: dict[str, Any] = {
        "seed": request.seed,
        "images": len(images),
        "photos": len(request.photos),
        "continues": request.continues,
    }
    alone = _views_alone(serving, request, folder)
    given = [(path, images), (alone, images)]
    if serving.int8:
        given.append((_write_float32(loaded, serving, request, folder), images))
    baseline = (_write_baseline(serving, images[-1], folder), images[-1:])
    by_jax = request.format == "stablehlo"
    try:
        ran, seen, *others = certificate.run_files(
            request.format, [*given, *([baseline] if by_jax else [])], request.python
        )
        beside = others.pop() if by_jax else certificate.run_files("stablehlo", [baseline])[0]
    except RunFailedError as error:
        return found | {"pass": False, "reasons": [str(error)]}
    pipeline = certificate.host_pipeline(loaded, serving.kind)
    first = [{name: array[:1] for name, array in outputs.items()} for outputs in ran.outputs]
    found |= certificate.compare(serving.kind, [pipeline(image[:1]) for image in images], first)
    views = [certificate.host_view(loaded, image[:1]) for image in images]
    ours = [outputs["view"][0] for outputs in seen.outputs]
    found["preprocessing"] = certificate.compare_views(views, ours)
    found |= {
        "runtime": dict(ran.runtime),
        "cpu_ms_an_image": round(1e3 * ran.seconds / len(images[-1]), 3),
        "cpu_time_beside_jax": round(ran.seconds / beside.seconds, 3),
    }
    rounds = serving.rounds_inputs
    if serving.int8:
        found["int8"] = {"kernels": len(serving.int8), "rounds_inputs": rounds}
        found["int8"] |= _beside_float32(serving.kind, ran, others[0], path, given[2][0])
    reasons = certificate.reasons(found, "int8" if rounds else "float32")
    return found | {"pass": not reasons, "reasons": reasons}


def _images(
    loaded: Loaded, serving: Serving, request: Request, rng: np.random.Generator
) -> list[np.ndarray]:
    """As many at once as the file takes, each repeated."""
    if serving.image_size is not None:
        sizes = [serving.image_size]
    else:
        side = max(loaded.preprocessing.image_size)
        sizes = certificate.sizes_around(rng, side, SIZES)
    images = certificate.fresh_images(rng, request.count, sizes, serving.channels)
    fixed = serving.image_size
    photos = [x for x in request.photos if fixed in (None, x.shape[1:3])]
    return [np.repeat(image, request.batch or 1, axis=0) for image in [*photos, *images]]


def view_alone(serving: Serving) -> Serving:
    """The preprocessing of a model, as a function from images to what the model sees."""
    return replace(
        serving,
        function=lambda images: {"view": serving.view(images)},
        outputs={"view": ""},
        int8={},
    )


def _views_alone(serving: Serving, request: Request, folder: Path) -> Path:
    """A file of the same format with the preprocessing alone."""
    (folder / "views").mkdir()
    write = FORMATS[request.format].write
    return write(view_alone(serving), request.batch, folder / "views")[0]


def _write_float32(loaded: Loaded, serving: Serving, request: Request, folder: Path) -> Path:
    """The same of the model before it was quantized, or else of its kernels in float."""
    plain = request.float32 or replace(
        loaded, variables={**loaded.variables, "params": factored.merge(loaded.variables["params"])}
    )
    whole = serving_function(certificate.as_float32(plain), image_size=serving.image_size)
    (folder / "float32").mkdir()
    return FORMATS[request.format].write(whole, request.batch, folder / "float32")[0]


def _beside_float32(
    kind: str, ran: Ran, plain: Ran, path: Path, plain_path: Path
) -> dict[str, Any]:
    """What int8 costs and saves: the file beside that of the model in float32, in its runtime."""
    first = [
        [{name: array[:1] for name, array in outputs.items()} for outputs in one.outputs]
        for one in (plain, ran)
    ]
    return {
        "beside_float32": certificate.compare(kind, *first)
        | {
            "bytes": round(file_bytes(path) / file_bytes(plain_path), 4),
            "cpu_time": round(ran.seconds / plain.seconds, 3),
        }
    }


def file_bytes(path: Path) -> int:
    """Of a file, with its weights beside it."""
    return sum(file.stat().st_size for file in _parts(path))


def _parts(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.stem}.*"))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_baseline(serving: Serving, images: np.ndarray, folder: Path) -> Path:
    """The same function for these images by JAX alone, in the forms that it runs best on a CPU."""
    made = jax.export.export(jax.jit(serving.function), platforms=["cpu"])(
        jax.ShapeDtypeStruct(images.shape, images.dtype)
    )
    path = folder / "views" / "jax.stablehlo"
    path.write_bytes(bytes(made.serialize()))
    return path


def _place(folder: Path, path: Path, out: Path, record: Mapping[str, Any]) -> Path:
    """Moves the files where they belong: what passed replaces what stood there, and what failed
    lies beside it under names of its own.
    """
    described = json.dumps(record, indent=1, ensure_ascii=False, default=list) + "\n"
    write_whole(described.encode(), folder / f"{path.name}.json")
    passed = record["certificate"]["pass"]
    for file in sorted(folder.glob(f"{path.stem}.*")):
        failed = out / f"{file.name}{FAILED}"
        failed.unlink(missing_ok=True)
        file.replace(out / file.name if passed else failed)
    return out / (path.name if passed else f"{path.name}{FAILED}")


def written(path: Path, record: Mapping[str, Any]) -> list[Path]:
    """All files of an export, of what `export` returned; the model comes first."""
    mark = path.name.removeprefix(record["file"])  # of what failed
    names = (record["file"], *record["beside"], f"{record['file']}.json")
    return [path.with_name(f"{name}{mark}") for name in names]
