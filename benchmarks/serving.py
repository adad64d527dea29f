"""`vision_jax serve` under load, and beside plain FastAPI handlers of the same model in PyTorch.

    pip install -e '.[parity]'
    python -m benchmarks.serving                             # by turns, 200 clients
    python -m benchmarks.serving --peers --requests=10000    # load test: ours alone, 5 % hostile

Clients keep their connections and send photos of mixed sizes and formats. Each answer is compared
with that of `vision_jax predict` of the same file. Hostile requests are damaged, lying, too large,
addresses to fetch, or clients that leave in the middle; each must get the status that is its own.
A request that is answered with 503 is sent again after as many seconds as the server says.

The peers hold the same weights in timm, by its own transforms, behind the handler that FastAPI's
documentation has for blocking work: a plain function, which runs in 40 threads. `plain` leaves
PyTorch as it is, `single` gives each image one thread of PyTorch. They get no hostile requests. CPU
time is that of all threads of a server's process. Each server has a session of its own, to which
Linux gives equal shares of the cores where other programs want them: else one of 40 threads would
get more than one of four. Still, quote rates from a quiet machine, and from any the ratios.
"""

import argparse
import asyncio
import contextlib
import io
import json
import os
import random
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WEIGHTS = "embedded:vit_cifar10"
ROOT = Path(__file__).parents[1]
HOSTILE = 0.05
SIDES = (32, 640)  # of photos, evenly on a logarithmic scale
FORMATS = (("jpeg", "jpg"), ("jpeg", "jpg"), ("jpeg", "jpg"), ("png", "png"), ("webp", "webp"))
PEERS = ("plain", "single")
RELATIVE = 1e-4  # of probabilities: batches of other sizes round otherwise
PATIENCE = 120  # seconds for an answer


# Requests -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A request.

    Attributes:
      name: what it is.
      content: all of its bytes.
      status: that it must get; 0: the client leaves before the answer.
      want: the names and probabilities of its images.
    """

    name: str
    content: bytes
    status: int = 200
    want: Sequence[dict[str, float]] = ()


def make_photos(rng: np.random.Generator, count: int) -> dict[str, bytes]:
    """Files by name: pictures of a few colors and noise."""
    files = {}
    for number in range(count):
        height, width = np.exp(rng.uniform(*np.log(SIDES), 2)).astype(int)
        cells = rng.integers(0, 256, (*rng.integers(2, 9, 2), 3), dtype=np.uint8)
        smooth = Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)
        noise = rng.normal(0, 8, (height, width, 3))
        pixels = np.clip(np.asarray(smooth) + noise, 0, 255).astype(np.uint8)
        kind, suffix = FORMATS[number % len(FORMATS)]
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind)
        files[f"{number:03d}.{suffix}"] = file.getvalue()
    return files


def predict_all(folder: Path, files: dict[str, bytes]) -> list[dict[str, float]]:
    """Names with probabilities of each file, by `vision_jax predict`."""
    from vision_jax.commands import predict

    for name, data in files.items():
        (folder / name).write_bytes(data)
    names = [str(folder / name) for name in files]
    with contextlib.redirect_stdout(io.StringIO()):
        predict.run({}, None, "last", names, folder / "predicted", WEIGHTS)
    record = json.loads((folder / "predicted/predictions.json").read_text())
    return [
        dict(zip(record["class_names"], one["probabilities"], strict=True))
        for one in record["images"]
    ]


def request(body: bytes, kind: str, query: str = "?top=10", declared: int | None = None) -> bytes:
    """The bytes of a POST."""
    length = len(body) if declared is None else declared
    head = f"POST /predict{query} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
    return f"{head}Content-Length: {length}\r\n\r\n".encode() + body


def form(files: Sequence[tuple[str, bytes]]) -> tuple[bytes, str]:
    """(body, type) of a form."""
    parts = [
        b'--part\r\nContent-Disposition: form-data; name="image"; filename="%s"\r\n'
        b"Content-Type: application/octet-stream\r\n\r\n%s\r\n" % (name.encode(), data)
        for name, data in files
    ]
    return b"".join([*parts, b"--part--\r\n"]), "multipart/form-data; boundary=part"


def sound_cases(files: dict[str, bytes], want: Sequence[dict[str, float]], plain: bool) -> list:
    """Each photo as a form; unless `plain` also as a body, and some together."""
    every = list(zip(files.items(), want, strict=True))
    cases = [Case("form", request(*form([one])), want=[shares]) for one, shares in every]
    if plain:
        return cases
    cases += [
        Case("body", request(data, "application/octet-stream"), want=[shares])
        for (_, data), shares in every
    ]
    for first in range(0, len(every) - 2, 10):
        some = every[first : first + 3]
        body = form([one for one, _ in some])
        cases.append(Case("three images", request(*body), want=[shares for _, shares in some]))
    return cases


def hostile_cases(rng: np.random.Generator, photo: bytes) -> list[Case]:
    """What must be refused, each with its status."""
    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", head), (b"IDAT", zlib.compress(bytes(10**6))))
    )
    jpeg = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (99, 99, 3), dtype=np.uint8)).save(jpeg, "jpeg")
    many = jpeg.getvalue()[:-2] + b"\xff\xda" * 200 + b"\xff\xd9"
    raw = "application/octet-stream"
    return [
        Case("random bytes", request(rng.bytes(5000), raw), 415),
        Case("half a photo", request(photo[: len(photo) // 2], "image/jpeg"), 422),
        Case("900 million pixels", request(bomb, "image/png"), 413),
        Case("200 scans", request(many, "image/jpeg"), 422),
        Case("an address", request(b'{"url": "http://127.0.0.1:1/"}', "application/json"), 415),
        Case("an address as a body", request(b"http://127.0.0.1:1/a.png", raw), 415),
        Case("nothing", request(b"", raw), 400),
        Case("a damaged form", request(b"--part", "multipart/form-data; boundary=part"), 400),
        Case("99 images", request(*form([("a.png", b"a")] * 99)), 413),
        Case("a terabyte", request(b"", "image/png", declared=10**12), 413),
        Case("an unknown field", request(photo, "image/jpeg", "?url=http://127.0.0.1:1/"), 400),
        Case("no HTTP", b"\x16\x03\x01\x00\r\n\r\n", 400),
        Case("leaves before the end", request(photo, "image/jpeg")[: -len(photo) // 3], 0),
        Case("leaves before the answer", request(photo, "image/jpeg"), 0),
    ]


def choose(rng: random.Random, sound: Sequence[Case], bad: Sequence[Case], count: int) -> list:
    """So many requests, the share HOSTILE of the bad ones, in a drawn order."""
    hostile = round(HOSTILE * count) if bad else 0
    cases = [bad[number % len(bad)] for number in range(hostile)]
    cases += [rng.choice(sound) for _ in range(count - hostile)]
    rng.shuffle(cases)
    return cases


# Clients ------------------------------------------------------------------------------------------


@dataclass
class Load:
    """What clients have seen.

    Attributes:
      seconds: of all of it.
      latencies: seconds of each sound request, from its first byte to its last answer.
      statuses: of answers, (name of the case, status).
      busy: answers of 503.
      wrong: lines, one for each answer that is not right.
    """

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    statuses: Counter = field(default_factory=Counter)
    busy: int = 0
    wrong: list[str] = field(default_factory=list)


async def run_clients(port: int, cases: Sequence[Case], clients: int, check: bool = True) -> Load:
    """Sends all cases, each client one after the other; no client waits for another."""
    load, rest = Load(), iter(cases)
    begin = time.perf_counter()
    await asyncio.gather(*(_client(port, rest, load, check) for _ in range(clients)))
    load.seconds = time.perf_counter() - begin
    return load


async def _client(port: int, rest: Iterator[Case], load: Load, check: bool) -> None:
    connection = None
    for case in rest:
        begin = time.perf_counter()
        while True:
            connection = connection or await asyncio.open_connection("127.0.0.1", port)
            try:
                async with asyncio.timeout(PATIENCE):
                    status, keep, body, wait = await _exchange(*connection, case)
            except (OSError, TimeoutError, EOFError, ValueError) as error:
                status, keep, body, wait = -1, False, repr(error).encode(), 0
            if not keep:
                connection[1].close()
                connection = None
            if status != 503:
                break
            load.busy += 1
            await asyncio.sleep(wait)
        load.statuses[case.name, status] += 1
        if case.status == 200:
            load.latencies.append(time.perf_counter() - begin)
        if status != case.status or (check and status == 200 and not _right(case, body)):
            load.wrong.append(f"{case.name}: {status} {body[:200]!r}")
    if connection is not None:
        connection[1].close()


async def _exchange(reader: Any, writer: Any, case: Case) -> tuple[int, bool, bytes, float]:
    """(status, whether the connection stays, body, seconds to wait)."""
    writer.write(case.content)
    if not case.status:
        await asyncio.sleep(0.01)
        return 0, False, b"", 0
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
    fields = dict(line.split(": ", 1) for line in head[1:] if line)
    body = await reader.readexactly(int(fields.get("content-length", 0)))
    keep = fields.get("connection") != "close"
    return int(head[0].split()[1]), keep, body, float(fields.get("retry-after", 1))


def _right(case: Case, body: bytes) -> bool:
    """Whether an answer is that of `predict`."""
    images = json.loads(body)["images"]
    if len(images) != len(case.want):
        return False
    for image, want in zip(images, case.want, strict=True):
        found = dict(image["top"])
        if image["class"] != max(want, key=lambda name: want[name]) or not found.keys() <= set(
            want
        ):
            return False
        if any(
            abs(share - want[name]) > RELATIVE * max(want.values()) for name, share in found.items()
        ):
            return False
    return True


# Servers ------------------------------------------------------------------------------------------


@dataclass
class Server:
    """A process that serves.

    Attributes:
      port: on the loopback.
      process: its handle.
    """

    port: int
    process: subprocess.Popen

    def cpu_seconds(self) -> float:
        """Of all threads, so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def megabytes(self) -> float:
        """Resident memory."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@contextlib.contextmanager
def served(*command: str) -> Iterator[Server]:
    """A server that is ready; it is stopped by SIGTERM and must end with 0."""
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("ready"):
                break
        else:
            raise SystemExit(f"{' '.join(command)}: it does not start")
        yield Server(int(line.split()[-1].rpartition(":")[2]), process)
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
        if process.stdout is not None:
            process.stdout.close()
    assert code == 0, f"{' '.join(command)} ended with {code}"


def counts(port: int) -> dict[str, float]:
    """The numbers of /metrics without labels."""
    import urllib.request

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return {
        line.split()[0]: float(line.split()[1])
        for line in lines
        if not line.startswith("#") and "{" not in line
    }


def run_peer(how: str, folder: str) -> None:
    """A plain FastAPI server of the model in timm; does not return."""
    import socket

    import timm
    import torch
    import uvicorn
    from fastapi import FastAPI, UploadFile

    if how == "single":
        torch.set_num_threads(1)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    data = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**data, is_training=False)
    names = json.loads(Path(folder, "config.json").read_text())["label_names"]
    app = FastAPI()

    def answer(file: Any) -> dict[str, Any]:
        picture = Image.open(file).convert("RGB")
        with torch.inference_mode():
            shares = model(transform(picture)[None]).softmax(-1)[0]
        top = [(names[label], shares[label].item()) for label in shares.argsort(descending=True)]
        return {"images": [{"class": top[0][0], "top": top}]}

    @app.post("/predict")
    def predict(image: UploadFile):
        return answer(image.file)

    listening = socket.create_server(("127.0.0.1", 0), backlog=2048)
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again once it has ended
    print(f"ready: http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
    config = uvicorn.Config(app, log_level="warning", access_log=False)
    uvicorn.Server(config).run(sockets=[listening])


# Tables -------------------------------------------------------------------------------------------


def percentile(values: Sequence[float], share: float) -> float:
    """Milliseconds."""
    return 1000 * float(np.percentile(values, 100 * share))


def run_load_test(flags: argparse.Namespace, sound: Sequence[Case], bad: Sequence[Case]) -> int:
    """Ours alone, with hostile requests; returns the exit code."""
    cases = choose(random.Random(flags.seed), sound, bad, flags.requests)
    steps = 10
    with served("-m", "vision_jax", "serve", WEIGHTS, "--port=0") as server:
        print(f"{len(cases)} requests of {flags.clients} clients, {HOSTILE:.0%} hostile")
        print(f"{'requests':>9}{'MB':>7}{'a second':>10}{'p50 ms':>9}{'p99 ms':>9}{'wrong':>7}")
        print(f"{0:9}{server.megabytes():7.0f}")
        every, wrong, statuses, busy = [], [], Counter(), 0
        for step in range(steps):
            some = cases[step * len(cases) // steps : (step + 1) * len(cases) // steps]
            load = asyncio.run(run_clients(server.port, some, flags.clients))
            every += load.latencies
            wrong += load.wrong
            statuses += load.statuses
            busy += load.busy
            print(
                f"{(step + 1) * len(cases) // steps:9}{server.megabytes():7.0f}"
                f"{len(some) / load.seconds:10.0f}{percentile(load.latencies, 0.5):9.0f}"
                f"{percentile(load.latencies, 0.99):9.0f}{len(load.wrong):7}",
                flush=True,
            )
        found = counts(server.port)
    for (name, status), count in sorted(statuses.items()):
        print(f"  {name:26}{status:5}{count:7}")
    filled = found["vision_jax_batch_images_total"] / found["vision_jax_batch_rows_total"]
    mean = found["vision_jax_batch_images_total"] / found["vision_jax_batch_seconds_count"]
    late = found["vision_jax_compilations_after_start_total"]
    print(
        f"p50 {percentile(every, 0.5):.0f} ms, p99 {percentile(every, 0.99):.0f} ms, "
        f"{busy} answers of 503, {mean:.1f} images a batch, {filled:.0%} of its rows; "
        f"compiled after the start: {late:.0f}; wrong answers: {len(wrong)}"
    )
    for line in wrong[:10]:
        print(f"WRONG {line}")
    return int(bool(wrong or late))


def run_beside(flags: argparse.Namespace, sound: Sequence[Case], folder: Path) -> int:
    """Ours and the peers by turns; returns the exit code."""
    import vision_jax

    loaded = vision_jax.load(WEIGHTS)
    vision_jax.save(folder / "timm", loaded, loaded.variables, to="timm")
    commands = {"ours": ("-m", "vision_jax", "serve", WEIGHTS, "--port=0")} | {
        how: ("-m", "benchmarks.serving", f"--serve={how}", f"--folder={folder / 'timm'}")
        for how in flags.peers
    }
    rng = random.Random(flags.seed)
    seen: dict[str, list[tuple[float, float, list[float]]]] = {name: [] for name in commands}
    wrong = 0
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(served(*one)) for name, one in commands.items()}
        for turn in range(flags.rounds + 1):  # the first one warms up
            for name, server in servers.items():
                cases = choose(rng, sound, (), flags.requests if turn else flags.clients)
                before = server.cpu_seconds()
                load = asyncio.run(run_clients(server.port, cases, flags.clients))
                spent = server.cpu_seconds() - before
                wrong += len(load.wrong)
                for line in load.wrong[:3]:
                    print(f"WRONG {name} {line}")
                if turn:
                    rate = len(cases) / load.seconds
                    seen[name].append((rate, 1000 * spent / len(cases), load.latencies))
        memory = {name: server.megabytes() for name, server in servers.items()}
    print(
        f"{flags.requests} requests of {flags.clients} clients a turn, {flags.rounds} turns; "
        f"{WEIGHTS}"
    )
    print(
        f"{'server':9}{'a second':>10}{'ratio':>7}{'(of turns)':>14}{'CPU-ms':>8}{'ratio':>7}"
        f"{'p50 ms':>8}{'p99 ms':>8}{'MB':>6}"
    )
    for name, turns in seen.items():
        ratios = [ours[0] / one[0] for ours, one in zip(seen["ours"], turns, strict=True)]
        cpu = statistics.median(one[1] for one in turns)
        ours_cpu = statistics.median(one[1] for one in seen["ours"])
        every = [seconds for one in turns for seconds in one[2]]
        print(
            f"{name:9}{statistics.median(one[0] for one in turns):10.0f}"
            f"{statistics.median(ratios):7.2f}{f'{min(ratios):.2f}-{max(ratios):.2f}':>14}"
            f"{cpu:8.2f}{cpu / ours_cpu:7.2f}"
            f"{percentile(every, 0.5):8.0f}{percentile(every, 0.99):8.0f}{memory[name]:6.0f}"
        )
    print("ratios: our rate over the peer's, the peer's CPU time over ours; wrong answers:", wrong)
    return int(bool(wrong))


def main() -> int:
    """Prints a table; returns 1 where an answer was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS, help="none: load test")
    parser.add_argument("--requests", type=int, default=1000, help="of a turn, or of the load test")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each")
    parser.add_argument("--photos", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.serve:
        run_peer(flags.serve, flags.folder)
        return 0
    rng = np.random.default_rng(flags.seed)
    files = make_photos(rng, flags.photos)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        want = predict_all(folder, files)
        sound = sound_cases(files, want, plain=bool(flags.peers))
        if flags.peers:
            return run_beside(flags, sound, folder)
        return run_load_test(flags, sound, hostile_cases(rng, files["000.jpg"]))


if __name__ == "__main__":
    raise SystemExit(main())
