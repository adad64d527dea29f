"""What is wrong with image files: damage, stated sizes, rotation, the same image twice."""

import os
from collections.abc import Sequence

from vision_jax.data.annotation_formats.reading import IMAGES, find_files
from vision_jax.data.sources import FileReader
from vision_jax.doctor.finding import EXAMPLES, Finding, Level, Subject
from vision_jax.doctor.scan import repeated_files


def diagnose_images(subject: Subject) -> list[Finding]:
    """Damage, stated sizes, rotation, files that nothing refers to, the same image twice."""
    scan, total = subject.scan, len(subject.paths)

    def finding(
        code: str, level: Level, title: str, found: Sequence[tuple[int, str]], advice: str
    ) -> list[Finding]:
        if not found:
            return []
        some = found[:EXAMPLES]
        rows = tuple(row for row, _ in some)
        texts = tuple(text for _, text in some)
        none = (-1,) * len(rows)
        return [Finding(code, level, title, len(found), total, "images", texts, advice, rows, none)]

    turned, wrong = [], []
    if subject.annotations is not None:
        for row, header in enumerate(scan.headers):
            stated = tuple(int(side) for side in subject.annotations.sizes[row])
            if header is None or 0 in stated or stated == header.upright_size:
                continue
            says = f"{subject.image(row)}: states {stated[1]} × {stated[0]}"
            height, width = header.upright_size
            if stated == (header.height, header.width):
                turned.append((row, f"{says}, turned by EXIF it is {width} × {height}"))
            else:
                wrong.append((row, f"{says}, is {width} × {height}"))
    findings = [
        *finding(
            "unreadable-image",
            "error",
            "images that can't be read",
            [(row, text) for row, text in sorted(scan.errors.items())],
            "get them again, or remove them; training skips and counts them, and stops if they are"
            " a larger share than config.data.max_damaged (0.01)",
        ),
        *finding(
            "wrong-size",
            "error",
            "images whose stated width and height are not the file's",
            wrong,
            "correct the sizes; if images were resized, boxes must be too",
        ),
        *finding(
            "exif-rotation",
            "warning",
            "photos that EXIF turns, with the width and height of the unturned file",
            turned,
            "see if boxes fit the turned or the unturned photo, and save photos upright",
        ),
    ]
    pairs = repeated_files(scan)
    if subject.annotations is None:
        clash = [(a, b) for a, b in pairs if subject.labels[a] != subject.labels[b]]
        names = subject.class_names
        findings += finding(
            "conflicting-labels",
            "error",
            "images that are there twice, in different classes",
            [
                (
                    a,
                    f"{subject.image(a)} ({names[subject.labels[a]]}) is {subject.image(b)}"
                    f" ({names[subject.labels[b]]})",
                )
                for a, b in clash
            ],
            "keep each in one class",
        )
        apart = set(clash)
        pairs = [pair for pair in pairs if pair not in apart]
    return findings + finding(
        "repeated-image",
        "information",
        "images that are there twice, byte for byte",
        [(a, f"{subject.image(a)} is {subject.image(b)}") for a, b in pairs],
        "harmless inside one split unless their annotations differ",
    )


def diagnose_loose_files(subject: Subject, other: Subject | None) -> list[Finding]:
    """Image files in the folder that neither annotations nor the other split's refer to."""
    if not isinstance(subject.reader, FileReader) or subject.annotations is None:
        return []
    folder = subject.reader.folder
    known = {os.path.normpath(folder / path) for path in subject.paths}
    if other is not None and isinstance(other.reader, FileReader):
        known |= {os.path.normpath(other.reader.folder / path) for path in other.paths}
    loose = [p for p in find_files(folder, IMAGES) if os.path.normpath(folder / p) not in known]
    if not loose:
        return []
    return [
        Finding(
            "not-referenced",
            "information",
            "image files in the folder that no annotation refers to",
            len(loose),
            len(loose) + len(subject.paths),
            "files",
            tuple(loose[:EXAMPLES]),
            "right if they belong to another split; else they are not trained on",
        )
    ]
