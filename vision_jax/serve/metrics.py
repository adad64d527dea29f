"""What /metrics says, by the project's own client of Prometheus; no global registry."""

from typing import Any

import jax

COMPILATION = "backend_compile_duration"  # the end of JAX's event for each program
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Metrics:
    """Counts of a server.

    Attributes:
      registry: of prometheus_client.
      requests: by "status".
      images: by "result": answered, refused, dropped.
      seconds: of whole requests.
      batch_images, batch_rows: in batches, and the rows that their programs have.
      batch_seconds: of the programs.
      queue: images that wait.
      ready: 1 once all is compiled.
    """

    def __init__(self) -> None:
        from prometheus_client import (
            CollectorRegistry,
            Counter,
            Gauge,
            Histogram,
            ProcessCollector,
        )

        self.registry: Any = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        given: dict[str, Any] = {"registry": self.registry, "namespace": "vision_jax"}
        self.requests = Counter("requests", "Answers by HTTP status.", ["status"], **given)
        self.images = Counter(
            "images", "Images by what became of them: answered, refused, dropped.", ["result"],
            **given,
        )  # fmt: skip
        self.seconds = Histogram(
            "request_seconds", "From a request's head to its answer.", buckets=SECONDS, **given
        )
        self.batch_images = Counter("batch_images", "Images in batches.", **given)
        self.batch_rows = Counter("batch_rows", "Rows of these batches, empty ones too.", **given)
        self.batch_seconds = Histogram(
            "batch_seconds", "Of the program of a batch.", buckets=SECONDS, **given
        )
        self.queue = Gauge("queue_images", "Images that wait for a batch.", **given)
        self.seats = Gauge("seats_taken", "Images that the server holds.", **given)
        self.ready = Gauge("ready", "1 once everything is compiled.", **given)
        self.compilations = Counter("compilations", "Programs compiled, all of them.", **given)
        self.late_compilations = Counter(
            "compilations_after_start", "Programs compiled once ready: 0 is right.", **given
        )
        self._ready = False
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration_secs: float, **others: Any) -> None:
        if event.endswith(COMPILATION):
            self.compilations.inc()
            if self._ready:
                self.late_compilations.inc()

    def set_ready(self, ready: bool) -> None:
        """What compiles from now on is late."""
        self._ready |= ready
        self.ready.set(int(ready))

    def count_batch(self, images: int, rows: int, seconds: float) -> None:
        """A batch was computed."""
        self.batch_images.inc(images)
        self.batch_rows.inc(rows)
        self.batch_seconds.observe(seconds)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)

    def close(self) -> None:
        """Hears of no more programs."""
        jax.monitoring.unregister_event_duration_listener(self._hear)
