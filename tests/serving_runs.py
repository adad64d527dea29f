"""A server in a thread of this process, and plain HTTP to it."""

import asyncio
import contextlib
import http.client
import io
import json
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

from vision_jax.commands import serve


@contextlib.contextmanager
def serving(source, *flags):
    """(port, parts) of a server that is ready; it ends with the block."""
    given = serve._parse([str(source), "--port=0", "--rows=1,4", *flags])
    parts, ended = serve.make_parts(given)
    with running(parts) as port:
        wait_until(lambda: parts.batcher.ready or ended)
        assert not ended, ended
        yield port, parts
    assert not parts.batcher.alive


@contextlib.contextmanager
def running(parts):
    """The port of an application that runs in a thread."""
    import uvicorn

    from vision_jax.serve.app import make_app, make_protocol

    given = {"log_level": "critical", "ws": "none", "lifespan": "on"}
    config = uvicorn.Config(make_app(parts), http=make_protocol(), **given)
    server = uvicorn.Server(config)
    listening = serve._listen("127.0.0.1", 0)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])))
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def wait_until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def ask(port, method, path, body=None, headers=None):
    """(status, headers, body)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def predict(port, data, kind="image/png", query=""):
    """(status, what the JSON says) of one raw body."""
    status, _, body = ask(port, "POST", f"/predict{query}", data, {"Content-Type": kind})
    assert b"\n" not in body
    return status, json.loads(body)


def form(port, files, query="", field="image"):
    """(status, what the JSON says) of files {name: bytes}."""
    body, kind = write_form(files.items(), field)
    return predict(port, body, kind, query)


def write_form(files, field="image"):
    """(body, its type)."""
    parts = [
        f'--b\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'.encode()
        + data
        + b"\r\n"
        for name, data in files
    ]
    return b"".join([*parts, b"--b--\r\n"]), "multipart/form-data; boundary=b"


def gauge(port, name):
    """A number of /metrics."""
    for line in ask(port, "GET", "/metrics")[2].decode().splitlines():
        if line.startswith(f"{name} "):
            return float(line.split()[1])
    raise AssertionError(name)


def photo(rng, height, width, kind="png", **options):
    """The bytes of a picture of a few colors and noise."""
    cells = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    noise = rng.integers(-20, 20, (height, width, 3))
    pixels = np.asarray(cells.resize((width, height), Image.Resampling.BICUBIC)) + noise
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, kind, **options)
    return file.getvalue()


def write_files(folder: Path, files):
    """The paths of files {name: bytes}."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return [str(folder / name) for name in files]


@contextlib.contextmanager
def compilations():
    """A list of what JAX compiles inside of the block."""
    import jax

    heard: list[str] = []

    def hear(event, seconds, **others):
        if "backend_compile" in event:
            heard.append(event)

    jax.monitoring.register_event_duration_secs_listener(hear)
    try:
        yield heard
    finally:
        jax.monitoring.unregister_event_duration_listener(hear)
