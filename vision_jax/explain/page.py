"""HTML files: images, the maps over them, and their figures. A page holds its own pictures."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from PIL import Image
from scipy import ndimage

from vision_jax.errors import printable

SIDE = 192  # of a picture on the page, in CSS pixels
LARGEST = 2 * SIDE  # of a picture's pixels, for screens with two of them a CSS pixel
THUMBNAIL = 64
QUALITY = 85  # of WebP, of 100
MAGENTA = (255, 0, 255)

_STYLE = """
:root { --heat: 0.6; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5em auto; max-width: 90em; padding: 0 1em;
       color: #222; background: #fff; }
h1 { font-size: 1.4em; } h2 { font-size: 1.05em; margin: 1.6em 0 .4em; }
h3 { font-size: .9em; margin: 1em 0 .3em; font-weight: 600; }
.row { display: flex; flex-wrap: wrap; gap: 1em; }
figure { margin: 0; width: SIDEpx; } figcaption { font-size: .82em; }
.stack { position: relative; width: SIDEpx; }
.stack img { width: SIDEpx; image-rendering: auto; display: block; }
.stack img.small { image-rendering: pixelated; }
.stack img.heat { height: 100%; position: absolute; left: 0; top: 0; opacity: var(--heat); }
table { border-collapse: collapse; } td, th { padding: .15em .8em; text-align: right; }
td:first-child, th:first-child { text-align: left; }
.thumbnail { max-width: 64px; max-height: 64px; }
.flag { color: #b00020; }
.tools { position: sticky; top: 0; background: #fffd; padding: .4em 0; }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #181818; } .tools { background: #181818dd; }
  .flag { color: #ff8080; } }
""".replace("SIDE", str(SIDE))
_TOOLS = (
    '<div class="tools"><label>maps over the images <input type="range" min="0" max="1" '
    'step="0.05" value="0.6" '
    "oninput=\"document.documentElement.style.setProperty('--heat', this.value)\"></label> "
    "{links}</div>"
)


@dataclass(frozen=True)
class Picture:
    """A map over an image; `heat` None is the image alone.

    Attributes:
      title: above it.
      lines: below it.
      image: u8[H, W, 3].
      heat: f[H, W], relevance.
    """

    title: str
    lines: Sequence[str]
    image: np.ndarray
    heat: np.ndarray | None = None


@dataclass(frozen=True)
class Section:
    """Rows of pictures under a heading.

    Attributes:
      anchor: where a link to it leads on its page.
      heading: above it.
      html: all of it.
      thumbnail: its first picture, small, as HTML.
    """

    anchor: str
    heading: str
    html: str
    thumbnail: str


@dataclass(frozen=True)
class Part:
    """A page of sections: its file, and what leads to it from the first page."""

    name: str
    html: str


def make_section(number: int, heading: str, rows: Mapping[str, Sequence[Picture]]) -> Section:
    """Rows of pictures by what they are, "" for nothing to say; its anchor is of its number."""
    anchor = f"row-{number}"
    parts = [f'<h2 id="{anchor}">{_text(heading)}</h2>']
    for title, pictures in rows.items():
        parts += [f"<h3>{_text(title)}</h3>"] if title else []
        parts += ['<div class="row">', *(_figure(picture) for picture in pictures), "</div>"]
    thumbnail = _data(next(iter(rows.values()))[0].image, THUMBNAIL)
    return Section(
        anchor,
        heading,
        "\n".join(parts),
        f'<img class="thumbnail" alt="" src="{thumbnail}">',
    )


def make_part(name: str, sections: Sequence[Section], shown: int) -> Part:
    """What the first page has of a page: a link, and the first images that are on it."""
    first, last = sections[0].heading, sections[-1].heading
    thumbnails = "".join(
        f'<a href="{name}#{one.anchor}" title="{_text(one.heading)}">{one.thumbnail}</a>'
        for one in sections[:shown]
    )
    return Part(
        name,
        f'<h2><a href="{name}">{_text(first)} to {_text(last)}</a></h2>'
        f'<div class="row">{thumbnails}</div>',
    )


def write_page(
    title: str,
    notes: Sequence[str],
    table: tuple[Sequence[str], Sequence[Sequence[str]]],
    sections: Sequence[Section],
    parts: Sequence[Part],
) -> str:
    """The first page: notes, a table (its head, its rows), and the sections, or what leads there.

    Args:
      title: of the page.
      notes: paragraphs.
      table: of text.
      sections: that are on this page.
      parts: the pages that the others are on.
    """
    head, rows = table
    above = [
        *(f"<p>{_text(note)}</p>" for note in notes),
        "<table><tr>" + "".join(f"<th>{_text(name)}</th>" for name in head) + "</tr>",
        *("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows),
        "</table>",
        *([_TOOLS.format(links="")] if sections else []),
    ]
    return _html(title, [*above, *(one.html for one in sections), *(one.html for one in parts)])


def write_part(title: str, sections: Sequence[Section], links: Mapping[str, str]) -> str:
    """A page of sections, with links (what they say: the file) to others."""
    shown = " · ".join(f'<a href="{file}">{_text(name)}</a>' for name, file in links.items())
    return _html(title, [_TOOLS.format(links=shown), *(one.html for one in sections)])


def _html(title: str, body: Sequence[str]) -> str:
    return "\n".join([
        "<!doctype html>",
        f'<html lang="en"><meta charset="utf-8"><title>{_text(title)}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{_STYLE}</style><h1>{_text(title)}</h1>",
        *body,
        "</html>\n",
    ])  # fmt: skip


def overlay(image: np.ndarray, heat: np.ndarray, strength: float = 0.6) -> np.ndarray:
    """u8[H, W, 3]: the heat in colors over the image in grey."""
    grey = image.astype(float).mean(-1, keepdims=True)
    colored = to_rgba(heat).astype(float)
    share = strength * colored[..., 3:] / 255
    return np.round((1 - share) * grey + share * colored[..., :3]).astype(np.uint8)


def outlined(image: np.ndarray, part: np.ndarray) -> np.ndarray:
    """u8[H, W, 3]: the image u8[H, W, 3] with the edge of the part bool[H, W] in magenta.

    No map has that color. The line is a pixel wide, of larger images so many.
    """
    within = ndimage.minimum_filter(
        part, size=2 * max(round(min(part.shape) / 150), 1) + 1, mode="constant", cval=False
    )
    drawn = image.copy()
    drawn[part & ~within] = MAGENTA
    return drawn


def to_rgba(heat: np.ndarray) -> np.ndarray:
    """u8[H, W, 4]: positive relevance in the colors of "turbo"; where there is least, transparent.

    The scale begins at 0 or at the least value, if all are above, and ends at the 99th percentile,
    so that one pixel does not hide the others.
    """
    positive = np.maximum(np.nan_to_num(np.asarray(heat, float)), 0)
    least = positive.min()
    most = np.percentile(positive, 99)
    most = most if most > least else positive.max()
    scaled = np.clip((positive - least) / (most - least if most > least else 1), 0, 1)
    colors = colormaps["turbo"](scaled)
    colors[..., 3] = np.clip(2 * scaled, 0, 1)  # little heat leaves the image to be seen
    return np.round(255 * colors).astype(np.uint8)


def to_rgb(view: np.ndarray) -> np.ndarray:
    """u8[H, W, 3] of u8[H, W, C]: grey three times, the first three of many channels."""
    return view[..., :3] if view.shape[2] >= 3 else view[..., :1].repeat(3, axis=2)


def _figure(picture: Picture) -> str:
    small = " small" if min(picture.image.shape[:2]) < SIDE // 2 else ""
    name = _text(picture.title)
    images = f'<img class="{small.strip()}" alt="{name}" src="{_data(picture.image)}">'
    if picture.heat is not None:
        images += f'<img class="heat" alt="" src="{_data(to_rgba(picture.heat))}">'
    lines = "<br>".join(_text(line) for line in picture.lines)
    return (
        f'<figure><figcaption><b>{name}</b></figcaption><div class="stack">{images}</div>'
        f"<figcaption>{lines}</figcaption></figure>"
    )


def _data(pixels: np.ndarray, largest: int = LARGEST) -> str:
    """A picture as an address that holds it: no side is longer than `largest` pixels.

    Photos and their maps are WebP, which shows no loss here and is a tenth as large as PNG; the
    pixels of small pictures are to be seen as they are.
    """
    picture, file = Image.fromarray(pixels), io.BytesIO()
    picture.thumbnail((largest, largest))
    small = min(pixels.shape[:2]) < SIDE // 2
    picture.save(file, format="WEBP", lossless=small, quality=QUALITY)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def _text(text: str) -> str:
    """Of a file's name or a class: nothing that HTML or a terminal obeys."""
    return html.escape(printable(text))
