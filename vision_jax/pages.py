"""What the pages for people have in common: colors by day and night, type, cards (pages.css)."""

from pathlib import Path


def read_template(path: Path) -> str:
    """A page's text, with the common styles in the place of its {{style}}."""
    style = Path(__file__).with_name("pages.css").read_text("utf-8")
    return path.read_text("utf-8").replace("{{style}}\n", style)
