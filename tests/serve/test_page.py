"""The page in a real browser: a person drops photos, and sees names, boxes or masks."""

import dataclasses
import io

import browser
import numpy as np
import pytest
import runs
import serving_runs
from PIL import Image

from vision_jax.serve.answers import Asked, make_describe
from vision_jax.serve.batches import Batcher
from vision_jax.serve.body import Limits
from vision_jax.serve.metrics import Metrics
from vision_jax.serve.model import Servable, View

pytest.importorskip("starlette", reason="the extra serve")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(browser.find() is None, reason="no Chromium is installed"),
]

ANSWERS = {
    "classes": {"logits": np.log(np.array([0.7, 0.2, 0.1], np.float32))},
    "boxes": {
        "score": np.array([0.9, 0.8, 0.0], np.float32),
        "label": np.array([1, 2, 0]),
        "boxes_xyxy_px": np.array([[20, 10, 120, 90], [60, 40, 199, 99], [0, 0, 1, 1]], np.float32),
    },
    "pixels": {"label": np.indices((100, 200)).sum(0).astype(np.uint8) // 50 % 3},
}
NAMES = ("a <b>cat</b>", "dog", "zebra")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browser.Browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@dataclasses.dataclass
class Answering:
    """Programs that find the same in each image."""

    kind: str
    rows: tuple = (1, 4)

    def run(self, canvas, views):
        return [ANSWERS[self.kind] for _ in views]


def parts_of(kind):
    """An application whose model is in ANSWERS; everything else is as always."""
    from vision_jax.serve.app import Parts

    def look(picture):
        size = (np.asarray(picture).shape[0], np.asarray(picture).shape[1])
        return View(0, np.zeros((1, 1, 3), np.uint8), size)

    servable = Servable(kind, NAMES, 3, ((1, 1),), look, None, None, None)
    batcher = Batcher(lambda: Answering(kind), wait=0.0)
    limits = Limits(pixels=100_000, seconds=30)
    describe = make_describe(servable)
    return Parts(servable, describe, Asked(), batcher, Metrics(), limits, 1, "a model of tests")


def photos(folder):
    """Two photos of 200 x 100 pixels, one on its side, one that is too large, and no photo."""
    row, column = np.indices((100, 200))
    pixels = np.stack([row * 2, column, 200 - row], -1).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "first.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(np.rot90(pixels).copy()).save(file, "jpeg", exif=exif)
    (folder / "turned.jpg").write_bytes(file.getvalue())
    Image.new("RGB", (500, 500)).save(folder / "large.png")
    (folder / "text.jpg").write_text("no photo")
    return [folder / name for name in ("first.jpg", "turned.jpg", "large.png", "text.jpg")]


def cards(page):
    return page.run("[...document.querySelectorAll('article')].map(card => card.innerText)")


def complaints(page):
    """What the browser has to say against the page."""
    return [
        event
        for event in page.events
        if event[0] == "Runtime.exceptionThrown"
        or (event[0] == "Log.entryAdded" and "status of 4" not in event[1]["entry"]["text"])
    ]


@pytest.mark.parametrize("kind", ANSWERS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_photos_are_answered(kind, scheme, page, tmp_path):
    files = photos(tmp_path)
    page.events.clear()
    page.prefer(scheme)
    with serving_runs.running(parts_of(kind)) as port:
        address = f"http://127.0.0.1:{port}/"
        page.open(address)
        page.choose("#files", *files)
        page.wait("document.querySelectorAll('article:not([aria-busy])').length == 4")
        assert "4 of 4 photos done" in page.run("document.getElementById('status').innerText")
        first, turned, large, text = cards(page)
        for card, name in ((first, "first.jpg"), (turned, "turned.jpg")):
            assert name in card
            for shown in {
                "classes": ("a <b>cat</b>", "70.0 %", "zebra", "10.0 %"),
                "boxes": ("dog", "0.90", "zebra", "0.80"),
                "pixels": ("a <b>cat</b>", "dog", "zebra", "%"),
            }[kind]:
                assert shown in card
        assert "500 × 500 pixels, over the limit" in large
        assert "not a readable image" in text
        fitted = page.run(
            "(() => { const figure = document.querySelector('figure'), over = figure.lastChild,"
            " a = figure.querySelector('img').getBoundingClientRect(),"
            " b = over.getBoundingClientRect(); return [over.tagName.toLowerCase(),"
            " Math.abs(a.width - b.width) + Math.abs(a.height - b.height) + Math.abs(a.x - b.x)"
            " + Math.abs(a.y - b.y), a.width / a.height]; })()"
        )
        assert fitted[0] == {"classes": "img", "boxes": "svg", "pixels": "img"}[kind]
        assert fitted[1] < 1
        assert fitted[2] == pytest.approx(2, abs=0.02)
        assert page.run("document.querySelectorAll('rect').length") == (8 if kind == "boxes" else 0)
        ground = page.run("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, ground[4:-1].split(","))) < 200) == (scheme == "dark")
        (tmp_path / "page.png").write_bytes(page.picture())
        page.drop(500, 200, files[0])
        page.wait("document.querySelectorAll('article:not([aria-busy])').length == 5")
        asked = [
            about["request"]["url"]
            for event, about in page.events
            if event == "Network.requestWillBeSent"
        ]
        assert all(url.startswith((address, "blob:", "data:")) for url in asked)
        assert not complaints(page)
        page.open(f"{address}docs")
        assert "POST /predict" in page.text()
        assert not complaints(page)
        page.open("about:blank")


def test_keys_and_screen_readers_find_everything(page, tmp_path):
    page.prefer("light", width=360, height=700)
    with serving_runs.running(parts_of("pixels")) as port:
        page.open(f"http://127.0.0.1:{port}/")
        page.press("Tab", 9)
        assert page.run("document.activeElement.id") == "files"
        page.choose("#files", photos(tmp_path)[0])
        page.wait("document.querySelectorAll('article:not([aria-busy])').length == 1")
        page.press("Tab", 9)
        assert page.run("document.activeElement.type") == "range"
        before = page.run("document.querySelector('img.over').style.opacity")
        page.press("ArrowRight", 39)
        assert page.run("document.querySelector('img.over').style.opacity") > before
        nodes = page.say("Accessibility.getFullAXTree")["nodes"]
        told = {
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node["ignored"]
        }
        for role, name in (
            ("button", "Choose photos or drop them here one or several; pasting works, too"),
            ("image", "first.jpg"),
            ("slider", "Mask"),
            ("heading", "first.jpg"),
            ("region", "Answers"),
        ):
            assert (role, name) in told, (role, sorted(told))
        assert "status" in {role for role, _ in told}
        assert page.run("document.documentElement.scrollWidth") <= 360  # nothing is cut off
        right = "document.querySelector('article').getBoundingClientRect().right"
        assert page.run(right) <= page.run("document.documentElement.clientWidth") - 16
        (tmp_path / "narrow.png").write_bytes(page.picture())
        page.open("about:blank")


def test_real_weights_in_the_browser(page, tmp_path):
    """From a photo to names, with nothing replaced."""
    photo = next(iter(sorted((runs.ROOT / "vision_jax/data/assets/aerial").glob("*.jpg"))))
    page.prefer("light")
    with serving_runs.serving("embedded:vit_cifar10") as (port, _):
        page.open(f"http://127.0.0.1:{port}/")
        page.choose("#files", photo)
        page.wait("document.querySelectorAll('article li').length == 5")
        assert "%" in cards(page)[0]
        page.open("about:blank")
