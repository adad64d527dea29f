"""What is wrong with masks: values without a name, other sizes, palettes, and what they show."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vision_jax.data.decode import DamagedImageError
from vision_jax.data.masks import IGNORED, FileMasks
from vision_jax.data.segmentation import SegmentationSource
from vision_jax.doctor.finding import EXAMPLES, Finding, Level, Subject, counted
from vision_jax.doctor.scan import THREADS, Scan
from vision_jax.errors import UserError
from vision_jax.files import open_regular

RARE = 0.001  # of all pixels that have a class
Palette = dict[int, tuple[int, ...]]  # of the values that a mask has


@dataclass(frozen=True)
class MaskScan:
    """Of N masks: `pixels` i64[N, C + 1] of each class and, last, ignored; 0 where unreadable.

    By row: `sizes` (height, width), `strange` values that are no class, `damaged` why it can't be
    read, and `palettes` of the values in it.
    """

    pixels: np.ndarray
    sizes: dict[int, tuple[int, int]]
    strange: dict[int, str]
    damaged: dict[int, str]
    palettes: dict[int, Palette]


def scan_masks(source: SegmentationSource, advance: Callable[[], object]) -> MaskScan:
    """Reads all masks in threads; `advance` is called after each."""
    classes = len(source.class_names)
    scan = MaskScan(np.zeros((len(source), classes + 1), np.int64), {}, {}, {}, {})

    def look(row: int) -> None:
        try:
            mask = source.mask(row)
            counts = np.bincount(mask.ravel(), minlength=256)
            scan.pixels[row] = [*counts[:classes], counts[IGNORED]]
            scan.sizes[row] = mask.shape[0], mask.shape[1]
            if (palette := _palette(source, row)) is not None:
                scan.palettes[row] = palette
        except DamagedImageError as error:
            scan.damaged[row] = str(error)
        except UserError as error:
            scan.strange[row] = str(error)
        finally:
            advance()

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(look, range(len(source))))
    return scan


def _palette(source: SegmentationSource, row: int) -> Palette | None:
    """The colors that a file gives to its values; None if it has no palette, or colors are read."""
    masks = source.masks
    if not isinstance(masks, FileMasks) or masks.table.colors:
        return None
    name = masks.example_name(int(source.rows[row]))
    if name.endswith(".npy"):
        return None
    with open_regular(name) as file, Image.open(file) as image:
        colors = image.getpalette("RGB") if image.mode == "P" else None
        if not colors:
            return None
        used = [value for _, value in image.getcolors(256) or ()]
    triples = [tuple(colors[i : i + 3]) for i in range(0, len(colors), 3)]
    whole = (value for value in used if isinstance(value, int))
    return {value: triples[value] for value in whole if value < len(triples)}


def diagnose_masks(subject: Subject, scan: MaskScan, images: Scan) -> list[Finding]:
    """Values that are no class, sizes, damage, palettes, one class alone, and shares of classes."""
    total = len(subject.paths)

    def finding(
        code: str, level: Level, title: str, found: dict[int, str], advice: str
    ) -> list[Finding]:
        if not found:
            return []
        rows = sorted(found)[:EXAMPLES]
        texts, none = tuple(found[row] for row in rows), (-1,) * len(rows)
        return [
            Finding(
                code, level, title, len(found), total, "masks", texts, advice, tuple(rows), none
            )
        ]

    wrong: dict[int, str] = {}
    turned: dict[int, str] = {}
    for row, size in scan.sizes.items():
        header = images.headers[row] if row < len(images.headers) else None
        if header is None or size == header.upright_size:
            continue
        height, width = header.upright_size
        text = (
            f"{subject.image(row)}: the mask is {size[1]} × {size[0]}, the image {width} × {height}"
        )
        (turned if size == (header.height, header.width) else wrong)[row] = text
    return [
        *finding(
            "mask-values",
            "error",
            "masks with values that are no class",
            scan.strange,
            "name the values in the table of classes, or null as their name to ignore them: borders"
            " are often 255, 254 or #e0e0c0",
        ),
        *finding(
            "unreadable-mask",
            "error",
            "masks that can't be read",
            scan.damaged,
            "get them again, or remove them; training skips and counts them, and stops if they are"
            " a larger share than config.data.max_damaged (0.01)",
        ),
        *finding(
            "mask-size",
            "error",
            "masks that are not of their image's size",
            wrong,
            "save each at its image's size, by nearest and never by interpolation; training takes"
            " them for damaged images",
        ),
        *finding(
            "exif-rotation",
            "warning",
            "photos that EXIF turns, with a mask of the unturned file's size",
            turned,
            "training takes these unturned; save photos upright",
        ),
        *finding(
            "swapped-palette",
            "error",
            "masks whose palette has other colors for the same numbers than most masks",
            _swapped(subject, scan),
            "classes are read by number: write all masks with one palette, or use colors",
        ),
        *_shown(subject, scan),
    ]


def _swapped(subject: Subject, scan: MaskScan) -> dict[int, str]:
    votes: dict[int, Counter[tuple[int, ...]]] = defaultdict(Counter)
    for palette in scan.palettes.values():
        for value, color in palette.items():
            votes[value][color] += 1
    usual = {value: colors.most_common(1)[0][0] for value, colors in votes.items()}
    found = {}
    for row, palette in scan.palettes.items():
        other = [value for value, color in sorted(palette.items()) if color != usual[value]]
        if other:
            value = other[0]
            found[row] = (
                f"{subject.image(row)}: {value} is {_hex(palette[value])}, and {_hex(usual[value])}"
                " in most masks"
            )
    return found


def _hex(color: Sequence[int]) -> str:
    return "#" + "".join(f"{level:02x}" for level in color)


def _shown(subject: Subject, scan: MaskScan) -> list[Finding]:
    """What masks show: one class alone, nothing, rare and unused classes, what is ignored."""
    names, readable = subject.class_names, sorted(scan.sizes)
    if not readable:
        return []
    pixels = scan.pixels[readable]
    of_class, ignored = pixels[:, :-1].sum(0), int(pixels[:, -1].sum())
    findings = []
    labelled = int(of_class.sum())
    used = np.flatnonzero(of_class)
    if len(used) < 2:
        what = f"all masks show {names[used[0]]!r} alone" if len(used) else "all pixels are ignored"
        findings.append(
            Finding(
                "one-class-alone",
                "error",
                f"{what}: there is nothing to learn",
                len(readable),
                len(readable),
                "masks",
                (subject.image(readable[0]),),
                "look at the table of classes, and whether masks were exported empty",
            )
        )
        return findings
    alone = [readable[i] for i in np.flatnonzero((pixels[:, :-1] > 0).sum(1) < 2)]
    background = [row for row in alone if scan.pixels[row, 0] or not scan.pixels[row, :-1].any()]
    if background:
        many = len(background) * 2 > len(readable)
        findings.append(
            Finding(
                "only-background",
                "warning" if many else "information",
                f"masks that show {names[0]!r} alone, or nothing",
                len(background),
                len(readable),
                "masks",
                tuple(subject.image(row) for row in background[:EXAMPLES]),
                "see if they were annotated; most steps learn from the others",
                tuple(background[:EXAMPLES]),
                (-1,) * len(background[:EXAMPLES]),
            )
        )
    shown = (pixels[:, :-1] > 0).sum(0)
    order = np.argsort(-of_class, kind="stable")
    findings.append(
        Finding(
            "class-shares",
            "information",
            f"the share of each class, of {counted(labelled, 'pixels')} that have one",
            len(used),
            len(names),
            "classes",
            tuple(
                f"{names[c]!r}: {of_class[c] / labelled:.2%}, in {shown[c]:,} of"
                f" {counted(len(readable), 'masks')}"
                for c in order[:EXAMPLES].tolist()
            ),
            "judge by the IoU of each class; weight classes by frequency where small ones matter",
        )
    )
    rare = [c for c in used.tolist() if of_class[c] < RARE * labelled]
    if rare:
        findings.append(
            Finding(
                "rare-class",
                "information",
                f"classes with less than {RARE:.1%} of the pixels",
                len(rare),
                len(names),
                "classes",
                tuple(f"{names[c]!r}: {of_class[c]:,} pixels" for c in rare[:EXAMPLES]),
                "expect a low IoU, or join them with others",
            )
        )
    unused = [names[c] for c in np.flatnonzero(of_class == 0)]
    if unused:
        findings.append(
            Finding(
                "unused-class",
                "information",
                "classes that no mask shows",
                len(unused),
                len(names),
                "classes",
                tuple(map(repr, unused[:EXAMPLES])),
                "remove them if they are not in the evaluation set either",
            )
        )
    if not ignored:
        findings.append(
            Finding(
                "nothing-ignored",
                "information",
                "no pixel is ignored (255)",
                len(readable),
                len(readable),
                "masks",
                (),
                "right if each pixel was judged; borders and unlabelled parts are better ignored",
            )
        )
    return findings
