"""Writes a log and is killed, again and again: `python watch_kills.py OUT REFERENCE`.

It forks before it has threads, which a test's own process has by then.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import scenes

from vision_jax.video import events
from vision_jax.video.rules import check, parse_rules

RULES = """
[rules.lawn]
kind = "inside"
zone = "lawn"
cooldown = 0.5
off = 2
[rules.gate]
kind = "cross"
line = "gate"
"""
FRAMES = 300


def frames():
    """People who come and go, for FRAMES frames."""
    ways = [scenes.walk((100 * k, 120 + 60 * k), (60 - 25 * k, 0), FRAMES) for k in range(5)]
    for i, rows in enumerate(zip(*ways, strict=True)):
        kept = [
            (*(row[0] % 640, row[1]), *row[2:]) for k, row in enumerate(rows) if (i + 7 * k) % 40
        ]
        yield i, scenes.times(FRAMES)[i], scenes.found(*kept)


def write(out, slow=0.0, ends=True):
    """Begins or goes on, to the end; one that doesn't end waits there to be killed."""
    text = RULES + scenes.FIELD
    rules = check(parse_rules(text, "rules", scenes.NAMES), scenes.SIZE)
    head = events.Head("made up", scenes.SIZE, scenes.NAMES)
    log, progress = events.open_log(out, head, rules, text)
    with log:
        for i, t, found in frames():
            if i > progress.frame:
                time.sleep(slow)
                progress, _, raised = events.step(rules, progress, log.frame(i, t, found))
                log.raised(raised)
        while not ends:
            time.sleep(1)
        log.end(rules, progress)


def main():
    """Kills 20 times, at a random moment of the writing of a random line."""
    out, reference = map(Path, sys.argv[1:])
    write(reference)
    full = (reference / events.DETECTIONS).stat().st_size - len(events.END)
    draw = random.Random(int(os.environ["SEED"]))
    for moment in sorted(draw.randrange(200, full - 200) for _ in range(20)):
        child = os.fork()
        if not child:
            write(out, slow=0.0005, ends=False)
            os._exit(0)
        path = out / events.DETECTIONS
        while not path.exists() or path.stat().st_size < moment:
            assert not os.waitpid(child, os.WNOHANG)[0], "it ended by itself"
        time.sleep(draw.random() * 0.002)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print("killed at", path.stat().st_size)
    write(out)


if __name__ == "__main__":
    main()
