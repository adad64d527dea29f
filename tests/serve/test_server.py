"""Requests to a real server: answers are `predict`'s, whatever comes is answered, bounds hold."""

import asyncio
import contextlib
import dataclasses
import gc
import io
import json
import re
import socket
import struct
import threading
import zlib
from concurrent.futures import CancelledError, ThreadPoolExecutor

import jsonschema
import numpy as np
import pytest
import runs
import serving_runs
from PIL import Image
from serving_runs import ask, form, gauge, photo, predict, serving

from vision_jax.commands import predict as predict_command
from vision_jax.commands import serve as command
from vision_jax.serve import body, openapi, page
from vision_jax.serve.batches import Batcher
from vision_jax.serve.model import Programs, View, compile_programs

HEAD = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n"
pytest.importorskip("starlette", reason="the extra serve")


@pytest.fixture(scope="module")
def server():
    """(port, parts) of a small classifier."""
    flags = ("--most-megapixels=0.5", "--most-megabytes=1", "--most-images=4", "--no-cache")
    with serving(runs.inputs() / "weights.safetensors", *flags) as found:
        yield found


def oriented(rng):
    """A JPEG whose EXIF says that it lies on its side."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(photo(rng, 30, 50)))
    image.save(file, "jpeg", exif=exif)
    return file.getvalue()


def palette(rng):
    """A PNG with a palette and transparent pixels."""
    file = io.BytesIO()
    image = Image.fromarray(rng.integers(0, 256, (33, 20, 4), dtype=np.uint8), "RGBA")
    image.quantize(16).save(file, "png")
    return file.getvalue()


def array(rng, *shape):
    file = io.BytesIO()
    np.save(file, rng.integers(0, 256, shape, dtype=np.uint8))
    return file.getvalue()


def bomb(height=40_000, width=40_000):
    """A PNG of a few bytes whose header says that it has 1.6 billion pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0"))


@pytest.mark.long
def test_answers_are_those_of_predict(server, rng, tmp_path, capsys):
    """Of any format and size, alone and several in one request."""
    port, _ = server
    files = {
        "a.png": photo(rng, 17, 90),
        "b.jpg": photo(rng, 120, 64, "jpeg", quality=80),
        "c.webp": photo(rng, 16, 16, "webp"),
        "turned.jpg": oriented(rng),
        "colors.png": palette(rng),
        "d.npy": array(rng, 25, 31, 3),
        "e.bmp": photo(rng, 300, 1, "bmp"),
    }
    names = serving_runs.write_files(tmp_path, files)
    weights = str(runs.inputs() / "weights.safetensors")
    assert predict_command.run({}, None, "last", names, tmp_path / "out", weights) == 0
    want = json.loads((tmp_path / "out/predictions.json").read_text())["images"]
    compiled = gauge(port, "vision_jax_compilations_total")
    given = list(files.items())
    several = []
    for first in range(0, len(given), 4):
        status, found = form(port, dict(given[first : first + 4]), "?top=3")
        assert status == 200
        several += found["images"]
    for name, one, other in zip(files, want, several, strict=True):
        status, alone = predict(port, files[name], "application/octet-stream", "?top=3")
        assert status == 200
        for record in (alone["images"][0], other):
            assert (record["class"], record["label"]) == (one["class"], one["label"])
            assert [kind for kind, _ in record["top"]] == [kind for kind, _ in one["top"]]
            got = [share for _, share in record["top"]]
            np.testing.assert_allclose(got, [share for _, share in one["top"]], rtol=1e-5)
        assert other["name"] == name
    turned = next(one for one in several if one["name"] == "turned.jpg")
    assert (turned["height"], turned["width"]) == (50, 30)
    assert gauge(port, "vision_jax_compilations_total") == compiled > 0


def test_what_compiles_late_is_counted(server):
    import jax

    port, _ = server
    before = gauge(port, "vision_jax_compilations_after_start_total")
    jax.jit(lambda x: x * 3.25 + 1)(np.arange(7, dtype=np.float32))
    assert gauge(port, "vision_jax_compilations_after_start_total") == before + 1


@pytest.mark.parametrize(
    ("data", "kind", "status", "reason"),
    [
        (b"", "image/jpeg", 400, "no image: send its bytes"),
        (b"hello", "image/jpeg", 415, "image: not a readable image (none of JPEG, PNG, "),
        (b'{"url": "http://127.0.0.1/a.png"}', "application/json", 415, "no address is ever"),
        (b"image=http://127.0.0.1/", "application/x-www-form-urlencoded", 415, "no address is"),
        (b"http://127.0.0.1:9/a.png", "image/png", 415, "not a readable image"),
        (bomb(), "image/png", 413, "image: 1600000000 pixels, over the limit of 500000: shrink"),
        (bomb(1000, 501), "image/png", 413, "501 × 1000 pixels, over the limit of 500000"),
        (bytes(1_000_001), "image/png", 413, "more than 1000000 bytes"),
        (b"nothing", "multipart/form-data", 400, "a damaged form: Missing boundary"),
        (b"nothing", "multipart/form-data; boundary=b", 400, "a damaged form"),
        (b"--b--\r\n", "multipart/form-data; boundary=b", 400, "no image: send its bytes"),
        (b"\x93NUMPY\x01\x00v\x00{'descr'", "application/octet-stream", 422, ".npy file"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_wrong_is_one_line_with_its_status(server, data, kind, status, reason):
    port, _ = server
    found, said = predict(port, data, kind)
    assert (found, list(said)) == (status, ["error"])
    assert reason in said["error"]
    assert "\n" not in said["error"]


def test_damaged_images(server, rng):
    port, _ = server
    whole = photo(rng, 90, 80, "jpeg")
    status, said = predict(port, whole[: len(whole) // 2])
    assert status == 422
    assert "truncated" in said["error"]
    status, said = predict(port, array(rng, 8, 8, 5), "application/octet-stream")
    assert status == 422
    assert "5 channels and the model takes 3" in said["error"]
    wide = {"a.png": b"nothing", "b.png": photo(rng, 9, 9), "\x1b[31m.png": bomb()}
    status, found = form(port, wide)
    assert status == 200
    assert [one.get("status", 200) for one in found["images"]] == [415, 200, 413]
    assert "\x1b" not in found["images"][2]["error"]
    status, found = form(port, {"a.png": bomb(), "b.png": b"nothing"})
    assert (status, list(found)) == (413, ["error"])  # the first one's
    status, found = form(port, {f"{number}.png": whole for number in range(5)})
    assert status == 413
    assert found["error"] == "more than 4 images: send them in several requests"
    sound = photo(rng, 9, 9)
    for _ in range(30):  # any damage has an answer, and the server lives on
        bad = bytearray(whole if rng.random() < 0.5 else sound)
        for place in rng.integers(0, len(bad), 20):
            bad[place] = rng.integers(256)
        assert predict(port, bytes(bad[: rng.integers(1, len(bad))]))[0] in (200, 413, 415, 422)
    assert predict(port, sound)[0] == 200


def test_an_image_that_memory_does_not_hold(server, rng, monkeypatch):
    def decode(*_, **__):
        raise MemoryError

    monkeypatch.setattr(body, "decode_picture", decode)
    status, said = predict(server[0], photo(rng, 9, 9))
    assert (status, said["error"]) == (413, "image: no memory for its pixels: shrink it")


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("?top=0", "top=0: use 1 to 1000000"),
        ("?top=a", "top='a' is no number"),
        ("?url=http://127.0.0.1/", "unknown query field 'url': top is known here"),
        ("?score=0.5", "unknown query field 'score': top is known here"),
    ],
)
def test_unknown_queries(server, query, reason, rng):
    status, said = predict(server[0], photo(rng, 9, 9), query=query)
    assert (status, said["error"]) == (400, reason)


def test_other_addresses_and_methods(server):
    port, _ = server
    for method, path, status in (
        ("GET", "/predict", 405),
        ("GET", "/../etc/passwd", 404),
        ("DELETE", "/", 405),
    ):
        found, _, body = ask(port, method, path)
        assert found == status
        assert "error" in json.loads(body)


def raw(port, *parts, wait=0.0):
    """What a server says to bytes that are sent part after part."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        for part in parts:
            connection.sendall(part)
            threading.Event().wait(wait)
        return connection.makefile("rb").read()


def test_a_body_without_a_length_is_held_to_the_bounds(server):
    head = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\n"
    chunk = b"%x\r\n" % 200_000 + bytes(200_000) + b"\r\n"
    said = raw(server[0], head + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 6, b"0\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 413 ")
    assert raw(server[0], b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 400 ")


def test_the_document_describes_the_answers(server, rng):
    port, _ = server
    status, headers, body = ask(port, "GET", "/openapi.json")
    assert (status, headers["content-type"]) == (200, "application/json")
    document = json.loads(body)
    assert document["openapi"] == "3.1.0"
    assert set(document["paths"]) == {"/predict", "/health", "/live", "/metrics", "/model"}
    responses = document["paths"]["/predict"]["post"]["responses"]
    schemas = {"components": document["components"]}

    def check(code, said):
        schema = responses[str(code)]["content"]["application/json"]["schema"]
        jsonschema.Draft202012Validator({**schemas, **schema}).validate(said)

    for files in ({"a.png": photo(rng, 9, 9)}, {"a.png": photo(rng, 9, 9), "b.png": b"nothing"}):
        status, said = form(port, files)
        check(status, said)
    check(*predict(port, bomb()))
    with pytest.raises(jsonschema.ValidationError):
        check(200, {"images": [{"name": "a", "boxes": []}]})
    assert all(status in openapi.ERRORS for status in (400, 408, 413, 415, 422, 503))
    described = json.loads(ask(port, "GET", "/model")[2])
    assert described["class_names"] == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert described["kind"] == "classes"


def test_pages_need_nothing_from_elsewhere(server):
    port, _ = server
    for path in ("/", "/docs"):
        status, headers, body = ask(port, "GET", path)
        text = body.decode()
        assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
        policy = headers["content-security-policy"]
        assert policy == page.policy(text)
        assert "default-src 'none'" in policy
        addresses = set(re.findall(r"[a-z]+://[^\s\"'`]+", text))
        assert addresses <= {
            "http://www.w3.org/2000/svg",
            "http://HOST/predict",
            "http://HOST/predict</code></pre>",
        }
        assert "style=" not in text.replace("$style=", "")  # which the policy forbids
        assert '<html lang="en">' in text
        assert "--ink: #1b1f24" in text  # of pages.css
        assert "{{style" not in text
    title = page.for_people("<script>alert(1)</script>", "boxes")
    assert "<script>alert" not in title


def test_health_and_life(server):
    port, _ = server
    assert json.loads(ask(port, "GET", "/health")[2]) == {"status": "ready"}
    assert ask(port, "GET", "/live")[0] == 200
    for name in ("vision_jax_ready", "vision_jax_seats_taken", "process_resident_memory_bytes"):
        assert gauge(port, name) >= 0


# Bounds, with programs that wait ------------------------------------------------------------------


@pytest.fixture
def slow(server, request):
    """(port, what programs wait for, set when one runs): three seats, a minute or as marked."""
    go, computing = threading.Event(), threading.Event()
    _, parts = server

    def run(canvas, views):
        computing.set()
        go.wait(60)
        return [{"logits": np.arange(3, dtype=np.float32)} for _ in views]

    batcher = Batcher(lambda: Programs(parts.servable, (1, 4), run), wait=0.0)
    seconds = getattr(request, "param", 60.0)
    limits = dataclasses.replace(parts.limits, seats=3, seconds=seconds, held_bytes=60_000)
    mine = dataclasses.replace(parts, batcher=batcher, limits=limits)
    with serving_runs.running(mine) as port:
        serving_runs.wait_until(lambda: batcher.ready)
        yield port, go, computing
        go.set()


def test_a_full_server_says_so_and_when_to_come_back(slow, rng):
    port, go, _ = slow
    data = photo(rng, 9, 9)
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(predict(port, data)[0])) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    serving_runs.wait_until(lambda: gauge(port, "vision_jax_seats_taken") == 3)
    status, headers, body = ask(port, "POST", "/predict", data, {"Content-Type": "image/png"})
    assert (status, json.loads(body)["error"][:4]) == (503, "busy")
    assert int(headers["retry-after"]) >= 1
    go.set()
    for thread in threads:
        thread.join()
    assert answers == [200] * 3
    assert form(port, {f"{number}.png": data for number in range(4)})[0] == 503  # never fits
    assert form(port, {f"{number}.png": data for number in range(3)})[0] == 200
    big = {"Content-Type": "image/png"}
    assert ask(port, "POST", "/predict", bytes(100_000), big)[0] == 503  # of all bytes at once
    serving_runs.wait_until(lambda: gauge(port, "vision_jax_seats_taken") == 0)


@pytest.mark.long
@pytest.mark.parametrize("slow", [0.5], indirect=True)
def test_a_deadline(slow, rng):
    """Of an answer, and of a body that comes byte by byte."""
    port, go, _ = slow
    data = photo(rng, 9, 9)
    status, said = predict(port, data)
    assert status == 503
    assert "no answer within the time" in said["error"]
    head = (
        b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: 9\r\n\r\n"
    )
    said = raw(port, head, b"1", wait=0.4)
    assert said.startswith(b"HTTP/1.1 408 ")
    go.set()
    assert predict(port, data)[0] == 200


def test_a_client_that_leaves_is_not_computed_for(slow, rng):
    port, go, computing = slow
    data = photo(rng, 9, 9)
    first = threading.Thread(target=lambda: predict(port, data))
    first.start()
    assert computing.wait(60)  # or the second image would go into the same batch
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(HEAD % len(data) + data)
        serving_runs.wait_until(lambda: gauge(port, "vision_jax_queue_images") == 1)
    serving_runs.wait_until(lambda: gauge(port, "vision_jax_seats_taken") == 1)
    go.set()
    first.join()
    serving_runs.wait_until(lambda: gauge(port, "vision_jax_queue_images") == 0)
    assert gauge(port, 'vision_jax_requests_total{status="499"}') >= 1


def images():
    """Uploads in memory."""
    return sum(type(one) is body.Upload for one in gc.get_objects())


def test_refused_images_go_at_once(server):
    """And not when the collector runs, which may be after hundreds of large ones."""
    gc.collect()
    before = images()
    gc.disable()
    try:
        for _ in range(3):
            assert predict(server[0], b"nothing")[0] == 415
            assert form(server[0], {"a.png": b"nothing", "b.png": b"\x93NUMPY"})[0] == 415
        serving_runs.wait_until(lambda: images() == before, seconds=5)
    finally:
        gc.enable()


def test_clients_that_leave_leave_no_image_behind(server, rng):
    """But the one that is being decoded, which has its seat until that ends."""
    _, parts = server
    decoding, free = threading.Event(), threading.Event()

    def look(picture):
        decoding.set()
        free.wait(60)
        return View(0, np.zeros((1, 1, 3), np.uint8), (9, 9))

    servable = dataclasses.replace(parts.servable, look=look)
    batcher = Batcher(lambda: Programs(servable, (1,), None), wait=0.0)
    mine = dataclasses.replace(parts, servable=servable, batcher=batcher, threads=1)
    data = photo(rng, 9, 9)
    gc.collect()
    before = images()
    with serving_runs.running(mine) as port:
        serving_runs.wait_until(lambda: batcher.ready)
        try:
            with contextlib.ExitStack() as clients:
                for _ in range(4):
                    client = clients.enter_context(socket.create_connection(("127.0.0.1", port)))
                    client.sendall(HEAD % len(data) + data)
                serving_runs.wait_until(lambda: images() == before + 4)
                assert decoding.wait(60)
            serving_runs.wait_until(lambda: images() == before + 1, seconds=10)
            serving_runs.wait_until(lambda: gauge(port, "vision_jax_seats_taken") == 1, seconds=10)
        finally:
            free.set()
        serving_runs.wait_until(lambda: gauge(port, "vision_jax_seats_taken") == 0)


def test_a_mask_does_not_wait_behind_images_that_are_to_be_decoded(server, rng):
    """One thread decodes; it is held by a second image when the first one's mask is found."""
    _, parts = server
    computing, go, held, free = (threading.Event() for _ in range(4))

    def look(picture):
        if picture.size == (8, 8):
            held.set()
            free.wait(60)
        return View(0, np.zeros((1, 1, 3), np.uint8), (9, 9))

    def run(canvas, views):
        computing.set()
        go.wait(60)
        return [{"label": np.zeros((9, 9), np.uint8)} for _ in views]

    servable = dataclasses.replace(parts.servable, kind="pixels", look=look)
    mine = dataclasses.replace(
        parts,
        servable=servable,
        describe=lambda found, size, asked: {"shares": {"all": 1.0}},
        batcher=Batcher(lambda: Programs(servable, (1,), run), wait=0.0),
        limits=dataclasses.replace(parts.limits, seconds=10.0),
        threads=1,
    )
    with serving_runs.running(mine) as port, ThreadPoolExecutor(2) as clients:
        serving_runs.wait_until(lambda: mine.batcher.ready)
        first = clients.submit(predict, port, photo(rng, 9, 9))
        assert computing.wait(60)
        second = clients.submit(predict, port, photo(rng, 8, 8))
        assert held.wait(60)
        go.set()
        try:
            assert first.result(60)[0] == 200
        finally:
            free.set()
        assert second.result(60)[0] == 200


def test_before_it_is_ready_it_lives_and_is_not_healthy(server, rng):
    _, parts = server
    go = threading.Event()
    batcher = Batcher(lambda: go.wait(60) and Programs(parts.servable, (1,), None), wait=0.0)
    with serving_runs.running(dataclasses.replace(parts, batcher=batcher)) as port:
        assert ask(port, "GET", "/live")[0] == 200
        status, _, body = ask(port, "GET", "/health")
        assert (status, json.loads(body)["status"]) == (503, "compiling")
        assert predict(port, photo(rng, 9, 9))[0] == 503
        go.set()
        serving_runs.wait_until(lambda: ask(port, "GET", "/health")[0] == 200)


def test_what_is_no_http_is_answered_in_json_too(server):
    for line in (b"\x16\x03\x01\r\n\r\n", b"nonsense\r\n\r\n"):
        head, _, body = raw(server[0], line).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert b"application/json" in head
        assert json.loads(body)["error"].startswith("Invalid HTTP")


def test_the_start_says_which_sizes_are_answered(server, capsys):
    _, parts = server
    for only in ((), ((64, 96), (32, 32))):
        servable = dataclasses.replace(parts.servable, only=only)
        with socket.create_server(("127.0.0.1", 0)) as listening:
            asyncio.run(command._tell(dataclasses.replace(parts, servable=servable), listening))
        shown = capsys.readouterr().out
        assert ("answers images of 64 x 96, 32 x 32 pixels" in shown) == bool(only)
        assert "--image-size=H,W" in shown or not only


def test_compiling_ends_between_programs(server):
    _, parts = server
    tiny = dataclasses.replace(
        parts.servable,
        canvases=((2, 3),),
        outputs=lambda variables, batch: {"size": batch["size"] + 1},
        make_read=lambda like: lambda found, size: found,
    )
    calls = []

    def check():
        calls.append(1)
        if len(calls) == 2:
            raise CancelledError

    with serving_runs.compilations() as compiled, pytest.raises(CancelledError):
        compile_programs(tiny, (1, 4, 16), check)
    assert len(compiled) == 1


# The command --------------------------------------------------------------------------------------


@pytest.mark.long(but=("flags",))
@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["nothing"], "nothing"),
        ([], "SOURCE"),
        (["embedded:vit_cifar10", "--port=70000"], "--port=70000: give a number from 0 to 65535"),
        (["embedded:vit_cifar10", "--rows=0,4"], "'0,4': give sizes such as 1,4,16"),
        (["embedded:vit_cifar10", "--queue=0"], "--queue=0"),
        (["embedded:vit_cifar10", "--image-size=8,8", "--port=0"], "takes images of any size"),
        (["embedded:vit_cifar10", "--checkpoint=best", "--port=0"], "is of the folder of a run"),
        (["embedded:vit_cifar10", "--host=256.0.0.1"], "--host=256.0.0.1"),
    ],
    ids=str,
)
def test_bad_flags_are_one_line(flags, reason, capsys):
    assert command.main(flags) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1
    assert reason in shown


def test_an_address_that_is_taken(server, capsys):
    assert command.main(["embedded:vit_cifar10", f"--port={server[0]}"]) == 2
    assert "Address already in use; choose another" in capsys.readouterr().err
