"""Answers images over HTTP: names, boxes or masks, many requests in one batch.

    vision_jax serve runs/vit_lora --port=8000
    vision_jax serve embedded:nanodet_coco --score=0.3
    vision_jax serve runs/segment_nuclei --window=256
    curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg' http://127.0.0.1:8000/predict

SOURCE is a run's folder, or weights as `predict --weights` takes them; answers are those of
`predict`. Everything is compiled before the first answer, and nothing later. With a browser, open
the address that it prints. SIGTERM and Ctrl-C answer what is there first. docs/serving.md says
more.
"""

import argparse
import asyncio
import importlib.util
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vision_jax.commands.source import RUN_FILE
from vision_jax.errors import UserError
from vision_jax.files import expand
from vision_jax.flags import image_size, make_parser, run

FAILED = 1  # exit code
PACKAGES = ("starlette", "uvicorn", "python_multipart", "prometheus_client")
# Rows of batches by what is served: each is one program, of a detector for each of its canvases.
ROWS = {"classes": (1, 4, 16), "features": (1, 4, 16), "boxes": (1, 4), "pixels": (1, 4)}
MOST_ROWS = 1024


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until it is stopped; returns the exit code: 0, 1 for a failure, 2 for bad input."""
    return run(lambda: _run(_parse(arguments)), "such a model", at_once=False)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    from vision_jax.serve.body import Limits

    default = Limits()
    parser = make_parser("vision_jax serve", __doc__)
    parser.add_argument("source", metavar="SOURCE", help="what to serve")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for all of the network")
    parser.add_argument("--port", type=int, default=8000, help="0 for any that is free")
    parser.add_argument("--checkpoint", choices=("last", "best"), help="of a run; last by default")
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read pickles, by torch's weights-only reader"
    )
    parser.add_argument(
        "--image-size",
        type=image_size,
        action="append",
        default=[],
        metavar="H,W",
        help="of a segmenter that sees images as they are: sizes that will come; repeat it",
    )
    parser.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="or in windows of N pixels, of any size; the run's evaluate.window by default",
    )
    parser.add_argument(
        "--score", type=float, help="boxes of a lower score are left out; the run's by default"
    )
    parser.add_argument(
        "--rows", type=_rows, metavar="1,4,16", help="sizes of batches, a program each"
    )
    parser.add_argument(
        "--wait", type=float, default=3, metavar="MS", help="that a first image waits for others"
    )
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="that decode images"
    )
    parser.add_argument(
        "--most-images", type=int, default=default.images, metavar="N", help="of a request"
    )
    parser.add_argument(
        "--most-megabytes", type=float, default=default.body_bytes / 1e6, help="of a request"
    )
    parser.add_argument(
        "--most-megapixels", type=float, default=default.pixels / 1e6, help="of an image"
    )
    parser.add_argument(
        "--queue", type=int, default=default.seats, metavar="N", help="images at once, then 503"
    )
    parser.add_argument(
        "--deadline",
        type=float,
        default=default.seconds,
        metavar="S",
        help="of a request, then 503",
    )
    parser.add_argument("--no-cache", action="store_true", help="compile anew")
    flags = parser.parse_args(arguments)
    for name, least, most in (
        ("port", 0, 2**16 - 1),
        ("score", 0, 1),
        ("window", 0, 4096),
        ("wait", 0, 10_000),
        ("threads", 1, 1024),
        ("most_images", 1, 10_000),
        ("most_megabytes", 0.001, 64),  # data/decode.py reads no more
        ("most_megapixels", 0.001, 64),
        ("queue", 1, 100_000),
        ("deadline", 0.1, 3600),
    ):
        value = getattr(flags, name)
        if value is not None and not least <= value <= most:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag}={value:g}: give a number from {least:g} to {most:g}")
    return flags


def _rows(text: str) -> tuple[int, ...]:
    rows = text.split(",")
    if not all(row.isdigit() and 1 <= int(row) <= MOST_ROWS for row in rows):
        raise argparse.ArgumentTypeError(f"{text!r}: give sizes such as 1,4,16")
    return tuple(sorted({int(row) for row in rows}))


def _run(flags: argparse.Namespace) -> int:
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is missing: pip install 'vision_jax[serve]'")
    with _listen(flags.host, flags.port) as listening:
        from vision_jax import machine

        if not flags.no_cache:
            machine.keep_compiled()
        parts, ended = make_parts(flags)
        code = asyncio.run(_serve(parts, ended, listening, flags.deadline))
        if parts.batcher.alive:  # in a program that it compiles, on which Python's end would wait
            sys.stdout.flush()
            os._exit(code)
        return code


def _listen(host: str, port: int) -> socket.socket:
    """Before the model is loaded: an address that is taken is told at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise UserError(f"--host={host} --port={port}: {reason}; choose another") from None


def make_parts(flags: argparse.Namespace) -> tuple[Any, list[BaseException]]:
    """(what the application is made of, where its thread puts the error that ends it)."""
    from vision_jax.serve.answers import Asked, make_describe
    from vision_jax.serve.app import Parts
    from vision_jax.serve.batches import Batcher
    from vision_jax.serve.body import Limits
    from vision_jax.serve.metrics import Metrics
    from vision_jax.serve.model import compile_programs, make_servable

    loaded, config = _load(flags)
    window, stride = flags.window or 0, 0
    if config.task == "segmentation":
        stride = config.evaluate.stride
        if flags.window is None and not flags.image_size:
            window = config.evaluate.window
    servable = make_servable(loaded, flags.image_size, window, stride)
    counter = None
    if servable.kind == "pixels":
        from vision_jax.tasks.segmentation.task import make_counter

        counter = make_counter(config, loaded.class_names)
    score = flags.score
    if score is None:
        score = config.evaluate.score if servable.kind == "boxes" else Asked().score
    rows = flags.rows or ROWS[servable.kind]
    metrics, ended = Metrics(), []

    def compile_all():
        programs = compile_programs(servable, rows, batcher.check)
        metrics.set_ready(True)
        return programs

    def end(error):
        metrics.set_ready(False)
        if error is not None:
            ended.append(error)
            os.kill(os.getpid(), signal.SIGTERM)

    batcher = Batcher(
        compile_all,
        wait=flags.wait / 1000,
        on_batch=metrics.count_batch,
        on_dropped=lambda images: metrics.images.labels("dropped").inc(images),
        on_end=end,
    )
    limits = replace(
        Limits(),
        body_bytes=int(flags.most_megabytes * 1e6),
        pixels=int(flags.most_megapixels * 1e6),
        images=flags.most_images,
        seats=flags.queue,
        seconds=flags.deadline,
    )
    described = make_describe(servable, counter)
    title = loaded.origin
    parts = Parts(
        servable,
        described,
        Asked(score=score),
        batcher,
        metrics,
        limits,
        flags.threads,
        title,
        masks=2 * max(rows) + flags.threads,  # a batch gathers while one is computed
    )
    return parts, ended


def _load(flags: argparse.Namespace) -> tuple[Any, Any]:
    """(the model, the config that says the rest), as `predict` has them."""
    from vision_jax.config import config_without_file, load_config
    from vision_jax.loaded import load, loaded_of
    from vision_jax.run.restore import restore

    workdir = expand(flags.source)
    if not (workdir / RUN_FILE).is_file() or not (workdir / "checkpoints").is_dir():
        if flags.checkpoint:
            raise UserError(f"--checkpoint is of the folder of a run, and {flags.source} is none")
        loaded = load(flags.source, allow_pickle=flags.allow_pickle)
        return loaded, config_without_file(loaded.family.task, {})
    config = load_config(str(workdir / RUN_FILE), {})
    trained = restore(config, workdir, flags.checkpoint or "last").trained
    if config.task == "segmentation" and config.data.targets != "semantic":
        raise UserError(
            f"{workdir}: segments (config.data.targets={config.data.targets}) are not served: "
            "`predict` finds them in files"
        )
    return loaded_of(trained, f"{workdir}"), config


async def _serve(
    parts: Any, ended: list[BaseException], listening: socket.socket, seconds: float
) -> int:
    import uvicorn

    from vision_jax.serve.app import make_app, make_protocol

    config = uvicorn.Config(
        make_app(parts),
        http=make_protocol(),
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="on",
        ws="none",
        timeout_graceful_shutdown=int(seconds) + 1,
    )
    # uvicorn raises a signal once more when it has ended well: that is no reason to die of it.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server = uvicorn.Server(config)
    telling = asyncio.create_task(_tell(parts, listening))
    await server.serve(sockets=[listening])
    telling.cancel()
    if ended:
        print(f"error: {type(ended[0]).__name__}: {ended[0]}", file=sys.stderr)
        return FAILED
    print("stopped, with everything answered")
    return 0


async def _tell(parts: Any, listening: socket.socket) -> None:
    """Says where the server is, and when it is ready."""
    host, port = listening.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(f"{parts.title}: compiling; {address}/health says when it is ready", flush=True)
    if only := parts.servable.only:
        sizes = ", ".join(f"{height} x {width}" for height, width in only)
        print(
            f"answers images of {sizes} pixels (height x width) as they are: --image-size=H,W is "
            "for others",
            flush=True,
        )
    while not parts.batcher.ready:
        await asyncio.sleep(0.1)
    count = parts.metrics.compilations._value.get()
    print(f"ready after {count:g} programs: {address}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
