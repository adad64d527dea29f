"""Watches videos by a detector, and raises alarms by rules.

    vision_jax watch vtest.avi --model=embedded:nanodet_coco --rules=configs/watch_lawn.toml \\
        --out=lawn
    vision_jax watch rtsp://10.0.0.7/1 /dev/video0 --model=runs/mine --rules=door.toml --out=door
    vision_jax watch frames --folder-rate=10 --rate=2 --model=runs/mine --rules=yard.toml --out=yard
    vision_jax watch --replay --rules=stricter.toml --out=lawn --to=stricter

A SOURCE is a video file, a folder of frames, a camera's device or an RTSP address. What was seen in
each frame, and each alarm, is on the disk before the next one; the same command completes what was
stopped. A file gives the same bytes each time. Beside it lie a still and a clip of each alarm, and
index.html, on which a person says which were false: `review` goes on from there. docs/video.md says
more.

Exit codes: 0; 1 if a source ended before its end or stalled, with everything written until then; 2
for bad input; 128 + n after signal n, with the frame finished and the files closed.
"""

import argparse
import importlib.util
import re
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vision_jax.commands.source import check_folder
from vision_jax.errors import UserError, printable
from vision_jax.files import expand, read_text
from vision_jax.flags import make_parser, run

if TYPE_CHECKING:
    from vision_jax.video.detect import Detector
    from vision_jax.video.events import Log, Logged, Progress
    from vision_jax.video.frames import Frame, Stream
    from vision_jax.video.outputs import Outputs, Wanted
    from vision_jax.video.rules import Rules

ENDED_EARLY = 1  # exit code
ROWS = 8  # frames of a batch of files; on a CPU 1, whose caches hold no more
SCORE = 0.1  # below it nothing goes on with a track
CLIP = Fraction(3)  # seconds before and after an alarm's beginning


@dataclass
class Source:
    """A source that is being watched: what changes from frame to frame.

    Attributes:
      stream: its frames.
      rules: in its pixels.
      log: of it.
      outputs: all that is made of its alarms beside the log.
      known: index of the last frame that the log has had from the beginning.
      past: those frames, as they were logged.
      progress: of its tracks and alarms.
      alarms: how many began.
    """

    stream: "Stream"
    rules: "Rules"
    log: "Log"
    outputs: "Outputs"
    known: int
    past: "Generator[Logged, None, None]"
    progress: "Progress"
    alarms: int = 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Watches until the sources end or it is stopped; returns the exit code, see above."""
    return run(lambda: _run(_parse(arguments)), "such a video", at_once=False)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("vision_jax watch", __doc__)
    parser.add_argument("sources", metavar="SOURCE", nargs="*", help="what to watch")
    parser.add_argument("--model", help="a run's folder, or weights as `predict` takes them")
    parser.add_argument("--rules", type=expand, help="a TOML file, see docs/video.md")
    parser.add_argument(
        "--out", type=expand, required=True, help="a folder; of several sources one in it for each"
    )
    parser.add_argument(
        "--score", type=float, default=SCORE, help="boxes of a lower score are left out"
    )
    parser.add_argument("--rate", type=_number, help="frames a second that are looked at; all")
    parser.add_argument(
        "--folder-rate", type=_number, metavar="RATE", help="frames a second of a folder of frames"
    )
    parser.add_argument("--duration", type=_number, metavar="S", help="seconds of each source")
    parser.add_argument("--frames", type=int, metavar="N", help="that are looked at of each source")
    parser.add_argument(
        "--timeout", type=float, default=30, metavar="S", help="without a frame: it has stalled"
    )
    parser.add_argument(
        "--certificates",
        type=expand,
        metavar="PEM",
        help="a file of certificates, of which an rtsps:// server must have one, or one signed by"
        " them; without it nobody checks who answers",
    )
    parser.add_argument(
        "--rows", type=int, metavar="N", help=f"frames of a batch; {ROWS}, on a CPU or live 1"
    )
    parser.add_argument(
        "--clips",
        type=float,
        metavar="S",
        help=f"seconds before and after each alarm's beginning, 0 for none; {CLIP}",
    )
    parser.add_argument("--annotate", action="store_true", help="a video with all that was seen")
    parser.add_argument("--webhook", metavar="URL", help="a host that each event is sent to")
    parser.add_argument("--checkpoint", choices=("last", "best"), help="of a run; last by default")
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read pickles, by torch's weights-only reader"
    )
    parser.add_argument("--no-cache", action="store_true", help="compile anew")
    parser.add_argument(
        "--replay",
        action="store_true",
        help="compute events.jsonl of --out again, by --rules if they are given, without a video",
    )
    parser.add_argument(
        "--to", type=expand, metavar="DIR", help="where --replay writes; other rules need it"
    )
    flags = parser.parse_args(arguments)
    if flags.to and not flags.replay:
        raise UserError("--to is of --replay")
    check_folder("--out", flags.out)
    if flags.to:
        check_folder("--to", flags.to)
    if flags.certificates:
        from vision_jax.video.frames import SECURE, without_secrets

        for source in flags.sources:
            if not source.lower().startswith(SECURE):
                name = without_secrets(source)
                raise UserError(
                    f"--certificates is of {SECURE} sources, and {name} is none: leave one out"
                )
    if flags.replay == bool(flags.sources):
        raise UserError("name a SOURCE to watch, or --replay with the --out of one; see --help")
    if not flags.replay:
        for name in ("model", "rules"):
            if getattr(flags, name) is None:
                raise UserError(f"--{name} is missing; see --help")
    for name, least, most in (
        ("score", 0, 1),
        ("frames", 1, 10**12),
        ("timeout", 0.1, 86_400),
        ("rows", 1, 256),
        ("clips", 0, 600),
    ):
        value = getattr(flags, name)
        if value is not None and not least <= value <= most:
            raise UserError(f"--{name}={value:g}: give a number from {least:g} to {most:g}")
    return flags


def _number(text: str) -> Fraction:
    """Frames a second or seconds, such as 5, 0.5 or 30000/1001; the type of a flag."""
    from vision_jax.video.frames import exact

    number = exact(text)
    if number is None or not Fraction(1, 10**6) <= number <= 10**9:
        raise argparse.ArgumentTypeError(f"{text!r} is no number such as 5, 0.5 or 30000/1001")
    return number


def _run(flags: argparse.Namespace) -> int:
    if flags.replay:
        return _replay(flags)
    from vision_jax import machine
    from vision_jax.video.events import unmet
    from vision_jax.video.frames import content_of, open_stream

    outs = _folders(flags.out, flags.sources)
    machine.keep_memory(one_heap=False)
    if not flags.no_cache:
        machine.keep_compiled()
    with ExitStack() as stack:
        signals = stack.enter_context(_signals())
        how: dict[str, Any] = {"rate": flags.rate, "timeout": flags.timeout}
        how["certificates"] = flags.certificates
        how |= {"most": flags.frames, "seconds": flags.duration, "stopped": lambda: bool(signals)}
        try:
            streams = [
                stack.enter_context(open_stream(one, folder_rate=folder_rate, **how))
                for one, folder_rate in zip(flags.sources, _folder_rates(flags), strict=True)
            ]
        except KeyboardInterrupt:
            raise KeyboardInterrupt(*signals[:1]) from None
        alone = machine.is_cpu() or any(stream.live for stream in streams)
        rows = flags.rows or (1 if alone else ROWS)
        detector = _load_detector(flags, rows)
        sources = [
            _begin(flags, stream, content_of(source), detector, out, stack)
            for stream, source, out in zip(streams, flags.sources, outs, strict=True)
        ]
        with _show(sources) as (advance, say):
            _watch(sources, detector, signals, advance, say)
            for one in () if signals else sources:
                for line in one.outputs.deliver():
                    say(line)
    for one in sources:
        notes = [] if signals else unmet(one.log.out, one.rules)
        for note in (*one.stream.notes(), *map(printable, notes)):
            print(f"note: {note}", file=sys.stderr)
        print(f"wrote {one.log.out / 'detections.jsonl'}, {one.log.out / 'events.jsonl'}")
    if signals:
        whole = all(one.stream.live for one in sources)
        print(f"stopped{'' if whole else '; the same command goes on'}", file=sys.stderr)
        return 128 + signals[0]
    return ENDED_EARLY if any(one.stream.problem for one in sources) else 0


def _watch(
    sources: Sequence[Source],
    detector: "Detector",
    signals: Sequence[int],
    advance: Callable[[int, int, Fraction], None],
    say: Callable[[str], None],
) -> None:
    """The loop, in the order that the data flows.

    Args:
      sources: each with what is known of it; changed here.
      detector: of all.
      signals: those that came; the first ends the loop.
      advance: called with (place of a source, frames, seconds of the source).
      say: a line for a person.
    """
    from vision_jax.video.events import step
    from vision_jax.video.frames import batches

    for place, frames in batches([one.stream for one in sources], detector.rows):
        one = sources[place]
        if signals and not one.stream.live:
            continue  # its batch may be short; the same command takes it up again
        if not frames:
            _finish(one, say)
            continue
        found: Sequence[Any] = frames
        if frames[-1].index > one.known:
            found = detector.run([frame.pixels for frame in frames])
        for frame, boxes in zip(frames, found, strict=True):
            new = frame.index > one.known
            if new:
                logged = one.log.frame(frame.index, frame.time, boxes)
            else:  # what it raised is in the log, and its pictures may not be
                logged = _again(one, frame)
            one.progress, tracks, events = step(one.rules, one.progress, logged)
            if new:
                one.log.raised(events)
            one.outputs.frame(frame.pixels, one.progress, tracks, events)
            one.alarms += sum(event["event"] == "start" for event in events)
            for event in events if new else ():
                say(_line(one, event))
        advance(place, len(frames), frames[-1].time)


def _again(one: Source, frame: "Frame") -> "Logged":
    """A frame that was logged before a stop."""
    logged = next(one.past)
    if (logged.frame, logged.time) != (frame.index, frame.time):
        raise UserError(
            f"{one.log.out}: its log has frame {logged.frame} at {float(logged.time):.3f} s where "
            f"{one.stream.name} has {frame.index} at {float(frame.time):.3f} s: name another --out"
        )
    if logged.frame == one.known:
        one.past.close()
    return logged


def _finish(one: Source, say: Callable[[str], None]) -> None:
    """At the end of a source."""
    if one.progress.frame < one.known:
        raise UserError(
            f"{one.log.out}: its log goes on to frame {one.known}, and {one.stream.name} ends at "
            f"{one.progress.frame}: name another --out"
        )
    written = one.outputs.finish()  # what a kill leaves out here is made by the same command
    for event in one.log.end(one.rules, one.progress):
        say(_line(one, event))
    for line in (*written, one.outputs.page()):
        say(line)


# Before the loop ----------------------------------------------------------------------------------


def _load_detector(flags: argparse.Namespace, rows: int) -> "Detector":
    from vision_jax.commands.source import load_source
    from vision_jax.video.detect import make_detector

    loaded = load_source(
        flags.model,
        expand(flags.model),
        checkpoint=flags.checkpoint,
        allow_pickle=flags.allow_pickle,
    )
    return make_detector(loaded, rows, flags.score)


def _begin(
    flags: argparse.Namespace,
    stream: "Stream",
    content: str,
    detector: "Detector",
    out: Path,
    stack: ExitStack,
) -> Source:
    """Begins a source's log, or goes on with it: of a live one each start has its own folder."""
    from vision_jax.video.events import Head, begin, open_log, read_frames
    from vision_jax.video.outputs import Outputs
    from vision_jax.video.rules import check, read_rules

    wanted = _wanted(flags)
    start = stream.began if stream.live else None
    if start:
        out = _new_folder(out / f"{start:%Y%m%dT%H%M%S}")
    checked = check(read_rules(flags.rules, detector.class_names), stream.size, start)
    head = Head(
        stream.name,
        stream.size,
        detector.class_names,
        start.isoformat() if start else "",
        f"{detector.origin}, boxes from {flags.score:g} on, by {detector.rows}, "
        + (f"{flags.rate} frames a second" if flags.rate else "all frames")
        + (f", of content {content}" if content else ""),
    )
    log, progress = open_log(out, head, checked, read_text(flags.rules))
    stack.enter_context(log)
    outputs = stack.enter_context(Outputs(out, checked, wanted))
    past = read_frames(out)
    return Source(stream, checked, log, outputs, progress.frame, past, begin())


def _wanted(flags: argparse.Namespace) -> "Wanted":
    """What is made of alarms; clips where PyAV is installed, if nobody says otherwise."""
    from vision_jax.video.outputs import Wanted
    from vision_jax.video.webhook import parse_host

    clip = Fraction(str(flags.clips)) if flags.clips is not None else CLIP
    if flags.clips is None and not importlib.util.find_spec("av"):
        clip = Fraction(0)
    host = parse_host(flags.webhook) if flags.webhook else None
    return Wanted(clip, clip, annotated=flags.annotate, webhook=host)


def _folder_rates(flags: argparse.Namespace) -> list[Fraction | None]:
    """--folder-rate for the sources that are folders, or for all, who then say that they aren't."""
    folders = [expand(one).is_dir() for one in flags.sources]
    return [flags.folder_rate if one or not any(folders) else None for one in folders]


def _folders(out: Path, sources: Sequence[str]) -> list[Path]:
    """Where each source's files go: OUT, or OUT/NAME of several."""
    from vision_jax.video.frames import without_secrets

    if len(sources) < 2:
        return [out] * len(sources)
    found: list[str] = []
    for source in sources:
        stem = re.sub(r"[^\w.-]+", "_", Path(without_secrets(source).rstrip("/")).stem).strip("._")
        stem, count = stem or "source", 1
        while (name := stem if count == 1 else f"{stem}_{count}") in found:
            count += 1
        found.append(name)
    return [out / name for name in found]


def _new_folder(folder: Path) -> Path:
    """A folder of this name, or of one beside it, that isn't there."""
    found, count = folder, 1
    while found.exists():
        count += 1
        found = folder.with_name(f"{folder.name}_{count}")
    return found


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals to stop that came; a second one stops at once."""
    came: list[int] = []

    def note(number: int, _: Any) -> None:
        came.append(number)
        signal.signal(number, before[number])

    before: dict[int, Any] = {
        one: signal.signal(one, note) for one in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# For a person -------------------------------------------------------------------------------------


@contextmanager
def _show(
    sources: Sequence[Source],
) -> Iterator[tuple[Callable[[int, int, Fraction], None], Callable[[str], None]]]:
    """(advance, say): a bar for each source on a terminal, and lines above them."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(highlight=False, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}"))
    with Progress(
        *columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal
    ) as bars:
        tasks = [
            bars.add_task(printable(Path(one.stream.name).name), total=one.stream.seconds, said="")
            for one in sources
        ]
        counts, began = [0] * len(sources), time.monotonic()

        def advance(place: int, frames: int, seconds: Fraction) -> None:
            counts[place] += frames
            rate = counts[place] / max(time.monotonic() - began, 1e-9)
            said = f"{counts[place]:,} frames  {rate:.1f}/s  {sources[place].alarms} alarms"
            bars.update(tasks[place], completed=float(seconds), said=said)

        yield advance, lambda text: console.print(printable(text), markup=False)


def _line(one: Source, event: dict[str, Any]) -> str:
    """One line of an event."""
    minutes, seconds = divmod(float(event["time"]), 60)
    when = f"{Path(one.stream.name).name} {int(minutes)}:{seconds:06.3f}"
    if event["event"] == "start":
        who = ", ".join(
            f"{track['class']} {track['score']:.2f} (track {track['id']})"
            for track in event["tracks"]
        )
        return f"{when} alarm {event['number']} begins: {event['rule']}{who and ': '}{who}"
    if event["event"] == "end":
        return (
            f"{when} alarm {event['number']} ends: {event['rule']}, after "
            f"{float(event['seconds']):.3f} s"
        )
    return f"{when} the end, after {event['frames']:,} frames and {one.alarms} alarms"


def _replay(flags: argparse.Namespace) -> int:
    from vision_jax.video.events import load_rules, replay, unmet

    path = replay(flags.out, flags.rules, flags.to)
    for note in unmet(path.parent, load_rules(path.parent)):
        print(printable(f"note: {note}"), file=sys.stderr)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
