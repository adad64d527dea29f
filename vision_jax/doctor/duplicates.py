"""Images of one set that are nearly the same, and a list of those that training can do without."""

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from vision_jax.doctor.finding import EXAMPLES, Finding, Subject
from vision_jax.doctor.scan import same_files, similar_images
from vision_jax.files import write_whole

SHOWN = 3  # of a group


def diagnose_duplicates(subject: Subject, kept_of: Mapping[int, int]) -> list[Finding]:
    """The groups of images of which one is kept and the others are nearly that one.

    `kept_of` is what scan.near_duplicates found.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for row, kept in kept_of.items():
        groups[kept].append(row)
    if not groups:
        return []
    largest = sorted(groups, key=lambda kept: -len(groups[kept]))[:EXAMPLES]
    return [
        Finding(
            "near-duplicate",
            "information",
            f"images that are nearly an earlier one, of {len(groups):,}",
            sum(map(len, groups.values())),
            len(subject.paths),
            "images",
            tuple(_describe(subject, kept, groups[kept]) for kept in largest),
            "--exclude=FILE lists them, and config.data.exclude leaves them out of training",
            tuple(groups[kept][0] for kept in largest),
            (-1,) * len(largest),
        )
    ]


def _describe(subject: Subject, kept: int, rows: list[int]) -> str:
    more = f" and {len(rows) - SHOWN:,} more" if len(rows) > SHOWN else ""
    return f"{', '.join(map(subject.image, rows[:SHOWN]))}{more}: as {subject.image(kept)}"


def write_excluded(
    subject: Subject, kept_of: Mapping[int, int], other: Subject | None, path: Path
) -> int:
    """Writes what training can do without, for config.data.exclude; returns how many images.

    JSON, {name: the image that it is like}: of each group all but the first, and of what the other
    split also has all.
    """
    excluded = {subject.image(row): subject.image(kept) for row, kept in kept_of.items()}
    if other is not None:
        shared = dict(similar_images(subject.scan, other.scan))
        shared |= dict(same_files(subject.scan, other.scan))
        excluded |= {subject.image(a): f"{other.name}: {other.image(b)}" for a, b in shared.items()}
    write_whole(json.dumps(excluded, indent=1).encode() + b"\n", path)
    return len(excluded)
