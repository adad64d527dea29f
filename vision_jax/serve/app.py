"""The ASGI application: from a request to JSON, and back out of the way when nobody waits.

POST /predict   images -> answers
GET  /          the page for people
GET  /health    200 once everything is compiled and while requests are taken; else 503
GET  /live      200 while the thread that runs programs lives
GET  /metrics   Prometheus' text
GET  /openapi.json, /docs, /model

A request has a seat from its head to its answer, and seats are bounded; its body is read within
bounds, its images are decoded in a few threads, and their views wait for the one thread that runs
programs. A client that leaves takes its images out of the queue.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vision_jax.serve import openapi, page
from vision_jax.serve.answers import Asked, Describe, read_query
from vision_jax.serve.batches import Batcher
from vision_jax.serve.body import Limits, Refused, Room, Seat, Upload, linger, look_at, read_uploads
from vision_jax.serve.metrics import Metrics
from vision_jax.serve.model import Servable, Size, View

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

LONGEST_RETRY = 60  # seconds that a busy server asks clients to wait, at most
GONE = 499  # a client that left, as nginx counts it
HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}


@dataclass(frozen=True)
class Parts:
    """What an application is made of.

    Attributes:
      servable: the model.
      describe: what is said of what it found (answers.py).
      default: what is asked for where a request says nothing.
      batcher: its queue and thread, not started.
      metrics: counts.
      limits: of requests.
      threads: that decode images.
      title: of pages: where the model came from.
      masks: of a segmenter, that are in the programs' hands or wait to be described, at most.
    """

    servable: Servable
    describe: Describe
    default: Asked
    batcher: Batcher
    metrics: Metrics
    limits: Limits
    threads: int
    title: str
    masks: int = 16


def make_app(parts: Parts) -> "Starlette":
    """The application; it starts and ends the batcher with its own life."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route

    batcher, metrics, limits = parts.batcher, parts.metrics, parts.limits
    room, kind, predict_one = Room(limits), parts.servable.kind, parts.servable.by_windows
    pool = ThreadPoolExecutor(parts.threads, thread_name_prefix="decode")
    # Of its own: what was computed shall not wait behind all that is still to be decoded.
    describing = ThreadPoolExecutor(parts.threads, thread_name_prefix="describe")
    masks = asyncio.Semaphore(parts.masks)  # each is as large as the image that came
    described = openapi.describe(parts.servable, limits, parts.title)
    metrics.queue.set_function(lambda: batcher.waiting)
    metrics.seats.set_function(lambda: room.seats)

    @asynccontextmanager
    async def lifespan(app):
        batcher.start()
        try:
            yield
        finally:  # no request is left by now
            await asyncio.to_thread(batcher.close, limits.seconds)
            pool.shutdown()
            describing.shutdown()
            metrics.close()

    def refuse(error: Refused) -> Response:
        headers = {**HEADERS}
        if error.status == 503:
            wait = max(error.retry_after, round(room.seats * batcher.seconds_an_image))
            headers["Retry-After"] = str(min(max(wait, 1), LONGEST_RETRY))
        return JSONResponse({"error": str(error)}, error.status, headers)

    async def predict(request: Request) -> Response:
        begin = time.monotonic()
        seat = None
        try:
            asked = read_query(request.query_params, kind, parts.default)
            if not batcher.ready:
                raise Refused(503, "the server starts or stops: try again", 1)
            seat = room.enter()
            try:
                async with asyncio.timeout(limits.seconds):
                    uploads = await read_uploads(request, seat, limits)
            except TimeoutError:
                raise Refused(408, f"the body took longer than {limits.seconds:g} s") from None
            seat.take(len(uploads) - 1)
            left = limits.seconds - (time.monotonic() - begin)
            records = await _unless_gone(request, answer_all(uploads, asked, seat), left)
            response: Response = _json(records)
        except Refused as error:
            error.let_go()
            metrics.images.labels("refused").inc()
            response = refuse(error)
            if seat is not None:
                seat.leave()  # what still comes is thrown away
            if error.status in (408, 413, 415, 503):  # perhaps before the end of the body
                response.headers["Connection"] = "close"
                if error.status != 408:
                    await linger(request)
        except ClientDisconnect:
            response = Response(status_code=GONE)
        finally:
            if seat is not None:
                seat.leave()
        metrics.requests.labels(str(response.status_code)).inc()
        metrics.seconds.observe(time.monotonic() - begin)
        return response

    async def answer_all(uploads: list[Upload], asked: Asked, seat: Seat) -> list[dict[str, Any]]:
        """A record of each; where none could be read, the first one's error is raised."""
        found = await asyncio.gather(
            *(answer(upload, asked, seat) for upload in uploads), return_exceptions=True
        )
        records: list[dict[str, Any]] = []
        for upload, one in zip(uploads, found, strict=True):
            if isinstance(one, BaseException):
                if not isinstance(one, Refused):
                    raise one
                one.let_go()
                records.append({"name": upload.name, "status": one.status, "error": str(one)})
            else:
                records.append({"name": upload.name, **one})
        refused = [one for one in found if isinstance(one, Refused)]
        if len(refused) == len(uploads):
            raise refused[0]
        metrics.images.labels("answered").inc(len(uploads) - len(refused))
        metrics.images.labels("refused").inc(len(refused))
        return records

    def look(held: list[Upload], future: Future, seen: list[Size]) -> None:
        """In a thread: decodes an image, notes its size, and puts its view into the queue."""
        if future.cancelled():
            return
        try:
            view = look_at(held.pop(), limits, parts.servable.look)
            seen.append(view.size)
            if predict_one is None:
                batcher.submit(view, future)
                return
            label = predict_one(view.pixels, lambda windows: scores_of(windows, future))
            if future.set_running_or_notify_cancel():
                future.set_result({"label": label})
        except Exception as error:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

    def scores_of(windows: np.ndarray, future: Future) -> Iterator[np.ndarray]:
        """In a thread: waits for the scores of an image's next windows, one after the other."""
        if future.cancelled():
            raise Refused(GONE, "the client has left")
        some = [batcher.submit(View(0, window, window.shape[:2])) for window in windows]
        return (one.result()["scores"] for one in some)

    async def answer(upload: Upload, asked: Asked, seat: Seat) -> dict[str, Any]:
        async with masks if kind == "pixels" else nullcontext():
            return await answer_now(upload, asked, seat)

    async def answer_now(upload: Upload, asked: Asked, seat: Seat) -> dict[str, Any]:
        future: Future[Any] = Future()
        held, seen = [upload], list[Size]()
        looking = pool.submit(look, held, future, seen)
        try:
            found = await asyncio.wrap_future(future)
        finally:
            held.clear()  # if the client has left: the pool keeps what is cancelled for a while
            if not looking.cancel() and not looking.done():
                seat.works.append(asyncio.wrap_future(looking))
        (size,) = seen
        record = {"height": size[0], "width": size[1]}
        if kind == "pixels":  # counting and writing a mask takes its time
            loop = asyncio.get_running_loop()
            said = await loop.run_in_executor(describing, parts.describe, found, size, asked)
        else:
            said = parts.describe(found, size, asked)
        return record | said

    async def health(request: Request) -> Response:
        state = "ready" if batcher.ready else "compiling" if batcher.alive else "stopped"
        return JSONResponse({"status": state}, 200 if batcher.ready else 503, HEADERS)

    async def live(request: Request) -> Response:
        return JSONResponse({"alive": batcher.alive}, 200 if batcher.alive else 503, HEADERS)

    async def count(request: Request) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4", headers=HEADERS)

    async def describe(request: Request) -> Response:
        return JSONResponse(described, headers=HEADERS)

    async def model(request: Request) -> Response:
        return JSONResponse(openapi.about(parts.servable, limits, parts.title), headers=HEADERS)

    def show(text: str) -> Callable[[Any], Awaitable[Response]]:
        headers = {**HEADERS, "Content-Security-Policy": page.policy(text)}

        async def shown(request: Request) -> Response:
            return HTMLResponse(text, headers=headers)

        return shown

    async def http_error(request: Request, error: Any) -> Response:
        wrong = {404: "there is no such address: / has a page, /docs a list", 405: "another method"}
        text = wrong.get(error.status_code, error.detail)
        return JSONResponse({"error": text}, error.status_code, error.headers or HEADERS)

    async def our_error(request: Request, error: Exception) -> Response:
        metrics.requests.labels("500").inc()
        return JSONResponse({"error": f"the server failed: {type(error).__name__}"}, 500, HEADERS)

    return Starlette(
        routes=[
            Route("/", show(page.for_people(parts.title, kind))),
            Route("/docs", show(page.for_programs(described))),
            Route("/predict", predict, methods=["POST"]),
            *(
                Route(f"/{name}", answerer)
                for name, answerer in (
                    ("health", health),
                    ("live", live),
                    ("metrics", count),
                    ("openapi.json", describe),
                    ("model", model),
                )
            ),
        ],
        exception_handlers={HTTPException: http_error, Exception: our_error},
        lifespan=lifespan,
    )


def make_protocol() -> Any:
    """uvicorn's protocol, by which its own refusals, of what is no HTTP, are JSON as ours are."""
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    class Protocol(AutoHTTPProtocol):  # type: ignore[misc,valid-type]  # one of two classes
        def send_400_response(self, msg: str) -> None:
            body = json.dumps({"error": msg})
            head = (
                "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write((head + body).encode())
            self.transport.close()

    return Protocol


def _json(records: list[dict[str, Any]]) -> "Response":
    from starlette.responses import Response

    try:
        text = json.dumps({"images": records}, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise Refused(500, "the model's answer is not finite: its weights are damaged") from None
    return Response(text, media_type="application/json", headers=HEADERS)


async def _unless_gone(request: "Request", work: Any, seconds: float) -> Any:
    """What `work` gives, which is cancelled when the client leaves or time is over.

    Raises:
      ClientDisconnect: the client left.
      Refused: with 503, after `seconds`.
    """
    from starlette.requests import ClientDisconnect

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(leave())
    try:
        await asyncio.wait(
            {working, leaving}, timeout=max(seconds, 0), return_when=asyncio.FIRST_COMPLETED
        )
        if working.done():
            return working.result()
        if leaving.done():
            raise ClientDisconnect
        raise Refused(503, "busy: no answer within the time that the server allows", 1)
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.wait({working, leaving})  # which doesn't wait for threads
