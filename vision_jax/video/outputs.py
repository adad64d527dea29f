"""All that is made of alarms beside the log, fed frame by frame.

A loop over frames calls `frame` after each, `finish` at the end of a source, and `deliver` when
nothing else is to be done.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from vision_jax.video import events
from vision_jax.video.clips import ANNOTATED, Recorder, VideoWriter, alarmed_tracks, annotate
from vision_jax.video.page import write_page
from vision_jax.video.rules import Rules, wall_time
from vision_jax.video.track import Track
from vision_jax.video.webhook import Host, Webhook


class Wanted(NamedTuple):
    """What is to be made.

    Attributes:
      before, after: seconds of each alarm's clip around its beginning; both 0 for no clips.
      annotated: a video of all frames that are looked at.
      webhook: a host to send events to.
      patience: seconds that are waited for the host at the end.
    """

    before: Fraction = Fraction(3)
    after: Fraction = Fraction(3)
    annotated: bool = False
    webhook: Host | None = None
    patience: float = 30.0


class Outputs:
    """Of one source; a context manager.

    Attributes:
      out: the folder.
      rules: of `rules.check`.
    """

    def __init__(self, out: Path, rules: Rules, wanted: Wanted):
        assert rules.size is not None
        self.out, self.rules = out, rules
        self._patience = wanted.patience
        self._stack = ExitStack()
        self._recorder = Recorder(out, wanted.before, wanted.after)
        self._video = VideoWriter(out / ANNOTATED, rules.size) if wanted.annotated else None
        self._webhook = Webhook(out, wanted.webhook) if wanted.webhook else None

    def __enter__(self) -> "Outputs":
        if self._webhook:
            self._stack.enter_context(self._webhook)
        self._stack.enter_context(self._recorder)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self._video:  # of a run that was stopped before its end
                self._video.drop()
                self._video = None
        finally:
            self._stack.__exit__(kind, error, trace)

    def frame(
        self,
        pixels: np.ndarray,
        progress: events.Progress,
        tracks: Sequence[Track],
        raised: Sequence[Mapping[str, Any]],
    ) -> None:
        """A frame u8[H, W, 3], with what `events.step` gave of it; its events are in the log."""
        self._recorder.frame(pixels, progress.time, raised)
        if self._video:
            now = wall_time(self.rules, progress.time)
            text = f"{float(progress.time):.2f} s" if now is None else f"{now:%Y-%m-%d %H:%M:%S}"
            alarmed = alarmed_tracks(progress.alarms.alarms)
            drawn = annotate(pixels, self.rules, tracks, alarmed, text)
            self._video.write(drawn, progress.time)
        if raised and self._webhook:
            self._webhook.wake()

    def finish(self) -> list[str]:
        """Ends clips and video, before the log is; returns lines for a person."""
        said = []
        self._recorder.finish()
        if self._video:
            said.append(f"wrote {self._video.path}")
            self._video.close()
            self._video = None
        return said + [f"wrote {kind}" for kind in self._recorder.written()]

    def page(self) -> str:
        """Writes the page of the whole log; returns a line for a person."""
        return f"wrote {write_page(self.out, self.rules)}"

    def deliver(self) -> list[str]:
        """Waits for the host, which takes what it hasn't yet; returns lines for a person."""
        if not self._webhook:
            return []
        left, name = self._webhook.finish(self._patience), self._webhook.host.name
        said = [f"sent {self._webhook.sent} events to {name}"]
        if left:
            said.append(
                f"{name} has not taken {left} events ({self._webhook.reason or 'it is slow'}):"
                f" vision_jax review {self.out} --webhook=... sends them"
            )
        return said
