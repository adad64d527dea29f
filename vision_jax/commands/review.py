"""Looks at what `watch` has seen: the page of its alarms, figures, and images to fine-tune on.

    vision_jax review lawn
    vision_jax review lawn --intervals=true.csv --truth=gt.txt --class=person
    vision_jax review lawn --marks=marks.json --out=marked
    vision_jax review lawn --webhook=https://example.org/alarms

DIR is the --out of `watch`. Alarms are listed, and DIR/index.html is written anew. With
--intervals, a CSV of rule,start,end in seconds, alarms are measured: precision, recall and how late
they are. With --truth, a file of MOTChallenge's format, tracks are: MOTA, IDF1 and HOTA;
DIR/tracks.txt has them in the same format. Figures are in DIR/evaluation.json, too.

--marks is what the page exports when a person has judged its alarms: OUT/annotations.json with
OUT/images is a data set for configs/yolox_finetune.py and the other detectors' configs. --webhook
sends the events that the host hasn't taken. docs/video.md says more.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vision_jax.commands.source import check_folder
from vision_jax.errors import UserError, nearest
from vision_jax.files import expand, write_whole
from vision_jax.flags import make_parser, run
from vision_jax.logging import print_table, say

if TYPE_CHECKING:
    from vision_jax.video.rules import Rules

SHOWN = 50  # alarms in the table


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, or 2 for bad input."""
    return run(lambda: _run(_parse(arguments)), "such a log", at_once=False)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("vision_jax review", __doc__)
    parser.add_argument("folder", metavar="DIR", type=expand, help="the --out of `watch`")
    parser.add_argument("--intervals", type=expand, metavar="FILE", help="rule,start,end: seconds")
    parser.add_argument(
        "--tolerance", type=float, default=0.0, help="seconds an alarm may begin beside an interval"
    )
    parser.add_argument("--truth", type=expand, metavar="FILE", help="tracks in MOT's format")
    parser.add_argument(
        "--class", dest="classes", action="append", metavar="NAME", help="of the tracks; all"
    )
    parser.add_argument("--marks", type=expand, metavar="FILE", help="what the page exported")
    parser.add_argument("--out", type=expand, metavar="DIR", help="where images of --marks go")
    parser.add_argument("--score", type=float, help="least of a box that nobody marked")
    parser.add_argument("--webhook", metavar="URL", help="where events go that weren't taken")
    flags = parser.parse_args(arguments)
    if bool(flags.marks) != bool(flags.out):
        raise UserError("--marks and --out belong together: the marks, and where the images go")
    if flags.out:
        check_folder("--out", flags.out)
    if flags.classes and not flags.truth:
        raise UserError("--class is of --truth")
    if not 0 <= flags.tolerance < 1e7:
        raise UserError(f"--tolerance={flags.tolerance:g}: give seconds")
    if flags.score is not None and not 0 <= flags.score <= 1:
        raise UserError(f"--score={flags.score:g}: give a number from 0 to 1")
    return flags


def _run(flags: argparse.Namespace) -> int:
    from vision_jax.video.events import load_rules, unmet
    from vision_jax.video.feedback import write_coco
    from vision_jax.video.page import alarms_of, read_events, write_page
    from vision_jax.video.webhook import Webhook, parse_host

    host = parse_host(flags.webhook) if flags.webhook else None
    rules = load_rules(flags.folder)
    found = read_events(flags.folder)
    _list(alarms_of(found))
    for note in unmet(flags.folder, rules):
        say(f"note: {note}")
    figures: dict[str, Any] = {}
    if flags.intervals:
        figures["alarms"] = _measure_alarms(flags, rules, found)
    if flags.truth:
        figures["tracks"] = _measure_tracks(flags, rules)
    if figures:
        path = flags.folder / "evaluation.json"
        write_whole(json.dumps(figures, indent=1).encode(), path)
        say(f"wrote {path}")
    if flags.marks:
        made = write_coco(flags.folder, flags.marks, flags.out, rules, flags.score)
        say(
            f"wrote {made.path}: {made.images} images, {made.boxes} boxes, {made.taken_out} taken"
            f" out, {made.negatives} images without any"
        )
    say(f"wrote {write_page(flags.folder, rules)}")
    if host:
        with Webhook(flags.folder, host) as webhook:
            left = webhook.finish(60.0)
        say(f"sent {webhook.sent} events to {host.name}, {left} are left")
    return 0


def _list(alarms: Sequence[dict[str, Any]]) -> None:
    rows = [
        [
            alarm["number"],
            alarm["rule"],
            f"{alarm['time']:.1f}",
            f"{alarm['end'] - alarm['time']:.1f}",
            ", ".join(f"{one['class']} {one['id']}" for one in alarm["tracks"]),
            "" if alarm["score"] is None else f"{alarm['score']:.2f}",
        ]
        for alarm in alarms[:SHOWN]
    ]
    more = f", the first {SHOWN}" if len(alarms) > SHOWN else ""
    columns = ["alarm", "rule", "second", "seconds", "tracks", "score"]
    print_table(f"{len(alarms)} alarms{more}", columns, rows)


def _measure_alarms(
    flags: argparse.Namespace, rules: "Rules", found: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    from vision_jax.video.evaluate import alarm_figures, read_intervals
    from vision_jax.video.page import alarms_of

    names = [rule.name for rule in rules.rules]
    true = read_intervals(flags.intervals, names)
    begun = [(alarm["rule"], alarm["time"]) for alarm in alarms_of(found)]
    seconds = max((one["time"] for one in found if "time" in one), default=0.0)
    figures = alarm_figures(true, begun, names, seconds, flags.tolerance)
    columns = [
        "true",
        "alarms",
        "right",
        "repeats",
        "precision",
        "recall",
        "delay_median",
        "delay_max",
    ]
    rows = [
        [name, *("" if own[key] is None else f"{own[key]:.3g}" for key in columns)]
        for name, own in figures.items()
    ]
    print_table(f"alarms beside {flags.intervals}", ["rule", *columns], rows)
    return figures


def _measure_tracks(flags: argparse.Namespace, rules: "Rules") -> dict[str, Any]:
    from vision_jax.video.evaluate import (
        read_mot,
        seen,
        tracking_figures,
        tracks_of,
        without_distractors,
        write_mot,
    )

    names = flags.classes or list(rules.class_names)
    for name in names:
        if name not in rules.class_names:
            raise UserError(f"--class: there is no `{name}`{nearest(name, rules.class_names)}")
    labels = [rules.class_names.index(name) for name in names]
    truth = read_mot(flags.truth)
    frames = list(tracks_of(flags.folder, rules))
    path: Path = flags.folder / "tracks.txt"
    write_mot(((frame, [t for t in own if t.label in labels]) for frame, own in frames), path)
    say(f"wrote {path}")
    found = seen(frames, labels)
    kept = without_distractors(truth, found)
    figures = tracking_figures(truth.boxes, kept)
    counts = [sum(len(one.ids) for one in boxes.values()) for boxes in (found, kept)]
    figures["on_distractors"] = counts[0] - counts[1]
    rows = [[name, f"{value:.4g}"] for name, value in figures.items()]
    unseen = len(set(truth.boxes) - {frame for frame, _ in frames})
    note = f"; {unseen} frames of it were not looked at" if unseen else ""
    print_table(f"tracks beside {flags.truth}{note}", ["figure", "value"], rows)
    return figures


if __name__ == "__main__":
    sys.exit(main())
