"""What is explained, in files: a picture of each image, one JSON of figures, pages to look at.

All is written as it comes: a picture at once, an image's figures in a draft of the JSON, and a page
whenever there are enough for one. Kept of each page are SHOWN small pictures for the first page, a
fifth of the images, so that memory and the first page grow with these. Nothing here knows what is
explained, a class, a box or a region.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np
from matplotlib.figure import Figure

from vision_jax.data.pipeline import DamageLog
from vision_jax.errors import UserError
from vision_jax.evaluation import say_damaged
from vision_jax.explain import measures, page
from vision_jax.explain.explainer import RANDOM, Figures, Maps, survivors
from vision_jax.explain.page import Picture
from vision_jax.figures import save_figure
from vision_jax.files import own_draft_folder, write_whole
from vision_jax.logging import print_table, say, show_progress

Image = TypeVar("Image")  # what is said of one

RECORD, PAGE = "explanations.json", "explanations.html"
PART = "explanations_{}.html"  # pages of many images, from 1 on
PER_PAGE = 50  # images; of more there are several pages
SHOWN = 10  # images of a page that the first page shows, small

_CURVES = (
    "Insertion (higher is better) and deletion (lower) are areas under the class's probability "
    "while the most relevant pixels come or go; ROAD (higher) is the difference of its "
    "probability without the least and without the most relevant pixels."
)
_PLACES = (
    "Pointing (higher is better): how often a map's largest value is inside of the box or the "
    "region, beside how often that of the model with shuffled weights is: a place of a detector "
    "looks around itself whatever it has learned. Heat inside: the share of the positive values "
    "that is. What is relevant may lie around an object, too."
)
_SHUFFLED = (
    "Random weights: rank correlation with the map of the model with shuffled weights; from "
    f"{measures.SURVIVES} on a map does not explain the model."
)
# Figures as the table shows them: what there is of a classifier, or of parts of images.
_COLUMNS = {
    "insertion": ("insertion", ".3f", _CURVES),
    "deletion": ("deletion", ".3f", _CURVES),
    "road": ("ROAD", ".3f", _CURVES),
    "completeness": ("completeness error", ".1e", _CURVES),
    "pointing": ("pointing", ".3f", _PLACES),
    "shuffled_pointing": ("of random weights", ".3f", _PLACES),
    "inside": ("heat inside", ".3f", _PLACES),
    "rank_correlation": ("random weights", ".2f", _SHUFFLED),
}


class Report:
    """The files of what is explained, written as it comes; made by `open_report`."""

    def __init__(self, out: Path, title: str, draft: TextIO, what: str) -> None:
        self._out, self._title, self._draft, self._what = out, title, draft, what
        self._records = 0
        self._sections: list[page.Section] = []  # of the page that is not full
        self._parts: list[page.Part] = []  # pages that are written

    def add_record(self, record: Mapping[str, Any]) -> None:
        """An entry of the JSON's list."""
        self._draft.write((",\n" if self._records else "") + json.dumps(record))
        self._records += 1

    def add_section(self, heading: str, rows: Mapping[str, Sequence[Picture]]) -> None:
        """Rows of pictures by what they are, "" for nothing to say, on the pages."""
        if len(self._sections) == PER_PAGE:
            self._write_part(last=False)
        number = len(self._parts) * PER_PAGE + len(self._sections) + 1
        self._sections.append(page.make_section(number, heading, rows))

    def finish(self, listed: str, record: Mapping[str, Any], figures: Figures) -> None:
        """Says the figures, and writes what needs them.

        Args:
          listed: the name of the JSON's list of what `add_record` was given.
          record: what else the JSON has.
          figures: by method, the mean over the images.
        """
        flagged = survivors(figures)
        known = [name for name in _COLUMNS if any(name in own for own in figures.values())]
        columns = ["method", *(_COLUMNS[name][0] for name in known)]
        notes = list(dict.fromkeys(_COLUMNS[name][2] for name in known))
        rows = _rows(figures, known, flagged)
        print_table(f"Figures, the mean over the {self._what}", columns, rows)
        for name in flagged:
            say(
                f"warning: {name} says nearly the same of a model with shuffled weights (rank "
                f"correlation {figures[name]['rank_correlation']:.2f}): it shows the image, or "
                "where the model looks in any case, not what it has learned"
            )
        own = {"methods": figures, "survive_random_weights": flagged}
        self._write_record(listed, {**record, **own})
        say(f"wrote {self._out / RECORD}, all figures")
        several = bool(self._parts)
        if several:
            self._write_part(last=True)
        self._write(PAGE, page.write_page(
            self._title, notes, (columns, rows), self._sections, self._parts
        ))  # fmt: skip
        say(f"wrote {self._out / PAGE}, the maps beside each other")
        if several:
            first, last = (self._out / PART.format(n) for n in (1, len(self._parts)))
            say(f"wrote {first} to {last.name}, {PER_PAGE} images each, which it leads to")
        self._remove_older_parts()

    def _write_part(self, *, last: bool) -> None:
        number = len(self._parts) + 1
        links = {"all": PAGE}
        if number > 1:
            links["before"] = PART.format(number - 1)
        if not last:
            links["next"] = PART.format(number + 1)
        name = PART.format(number)
        self._write(name, page.write_part(f"{self._title}, page {number}", self._sections, links))
        self._parts.append(page.make_part(name, self._sections, SHOWN))
        self._sections = []

    def _write_record(self, listed: str, record: Mapping[str, Any]) -> None:
        """The draft's lines go into the list of the JSON, which is written whole or not at all."""
        self._draft.flush()
        written = Path(self._draft.name)
        whole = written.with_name(RECORD)
        with written.open() as lines, whole.open("w") as file:
            file.write(json.dumps(record, indent=2).removesuffix("\n}") + f',\n  "{listed}": [\n')
            file.writelines(lines)
            file.write("\n  ]\n}\n")
        whole.replace(self._out / RECORD)

    def _write(self, name: str, text: str) -> None:
        write_whole(text.encode(), self._out / name)

    def _remove_older_parts(self) -> None:
        """Pages that an earlier, longer report left in the folder: they are of other images."""
        number = len(self._parts) + 1
        while (left := self._out / PART.format(number)).is_file():
            left.unlink()
            number += 1


@contextmanager
def open_report(out: Path, title: str, what: str = "images") -> Iterator[Report]:
    """A report in the folder `out`, which is there; `finish` writes its JSON and first page.

    `what` has the figures.
    """
    with (
        own_draft_folder(out / RECORD) as folder,
        (folder / "records").open("w", encoding="utf-8") as draft,
    ):
        yield Report(out, title, draft, what)


def run_through(
    source: Sized, run: Callable[[DamageLog], Iterator[Image]], take: Callable[[Image], None]
) -> DamageLog:
    """Gives each image of a source to `take` as it comes: none is kept here.

    Args:
      source: with a `name`.
      run: explains what can be read, and logs what can't.
      take: what is done with an image.

    Raises:
      UserError: none of the images can be read.
    """
    damage, some = DamageLog(), False
    with show_progress(len(source), what="images") as (advance, _):
        for one in run(damage):
            some = True
            take(one)
            advance()
    if not some:
        name = getattr(source, "name", "images")
        raise UserError(f"{name}: none of them could be read, first {damage.lines[0]}")
    say_damaged(damage.lines)
    return damage


def _rows(figures: Figures, known: Sequence[str], flagged: Sequence[str]) -> list[list[str]]:
    def cell(name: str, figure: str) -> str:
        if figure not in figures[name]:
            return ""
        text = format(figures[name][figure], _COLUMNS[figure][1])
        survives = figure == "rank_correlation" and name in flagged
        return f"{text} SURVIVES" if survives else text

    return [[name.replace("_", " "), *(cell(name, figure) for figure in known)] for name in figures]


def pictures_of(
    view: np.ndarray, maps: Maps, figures: Figures, part: np.ndarray | None = None
) -> list[Picture]:
    """The image, and the maps over it with their figures.

    Args:
      view: u8[H, W, C], as the model sees it.
      maps: by method.
      figures: by method, and of RANDOM.
      part: bool[H, W], what is explained, whose edge is drawn.
    """
    image = page.to_rgb(view)
    if part is not None:
        image = page.outlined(image, part)
    return [
        Picture("image", [], image),
        *(
            Picture(
                name.replace("_", " "),
                [f"{figure.replace('_', ' ')} {value:.3f}" for figure, value in own.items()],
                image,
                maps[name],
            )
            for name, own in figures.items()
            if name != RANDOM
        ),
    ]


def write_picture(view: np.ndarray, maps: Maps, path: Path, part: np.ndarray | None = None) -> None:
    """The image and the maps over it beside each other, as a PNG; `part` as in `pictures_of`."""
    image = page.to_rgb(view)
    row = {"image": image}
    row |= {name: page.overlay(image, heat) for name, heat in maps.items()}
    if part is not None:
        row = {name: page.outlined(picture, part) for name, picture in row.items()}
    figure = Figure(figsize=(1.9 * len(row), 2.2), dpi=100, layout="constrained")
    cells = figure.subplots(1, len(row), squeeze=False)[0]
    for cell, (name, picture) in zip(cells, row.items(), strict=True):
        cell.imshow(picture, interpolation="nearest")
        cell.set_title(name.replace("_", " "), fontsize=9)
        cell.set_axis_off()
    save_figure(figure, path)
