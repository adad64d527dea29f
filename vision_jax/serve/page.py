"""Two pages that need nothing from elsewhere: one to drop photos on, one about the interface."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vision_jax.pages import read_template

_PAGE = Path(__file__).with_name("page.html")
_DOES = {
    "classes": "names what photos show",
    "boxes": "finds things in photos",
    "pixels": "gives each pixel of a photo a class",
    "features": "turns photos into vectors",
}


def for_people(title: str, kind: str) -> str:
    """The page on which a person drops photos."""
    text = read_template(_PAGE)
    for name, value in (("title", title), ("does", _DOES[kind])):
        text = text.replace(f"{{{{{name}}}}}", html.escape(value))
    return text


def policy(text: str) -> str:
    """A Content-Security-Policy under which the page's own script and styles run, and no others."""
    allowed = {}
    for tag in ("script", "style"):
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digests = [hashlib.sha256(part.encode()).digest() for part in parts]
        hashes = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
        allowed[tag] = " ".join(hashes) or "'none'"
    return (
        f"default-src 'none'; script-src {allowed['script']}; "
        f"style-src {allowed['style']}; img-src blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def for_programs(described: Mapping[str, Any]) -> str:
    """The OpenAPI document as a page."""
    parts = []
    for path, methods in described["paths"].items():
        for method, about in methods.items():
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>")
            parts.append(f"<p>{html.escape(about.get('description', about['summary']))}</p>")
            parts += [
                f"<p>Query: <code>{one['name']}</code>, {html.escape(one['description'])}</p>"
                for one in about.get("parameters", [])
            ]
            if method == "post":
                rows = "".join(
                    f"<tr><th scope=row>{code}</th><td>{html.escape(one['description'])}</td></tr>"
                    for code, one in about["responses"].items()
                )
                parts.append(f"<table><caption>Answers</caption>{rows}</table>")
    schema = json.dumps(described["components"]["schemas"]["Answer"], indent=2)
    style = re.search(r"<style>.*?</style>", read_template(_PAGE), re.DOTALL)
    assert style is not None
    title = html.escape(described["info"]["title"])
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
{style[0]}
</head>
<body>
<main class="text">
<h1>{title}</h1>
<p>The same for programs: <a href="openapi.json">openapi.json</a>. For people:
<a href="./">drop a photo</a>.</p>
<pre><code>curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg' http://HOST/predict
curl -F image=@one.jpg -F image=@two.jpg http://HOST/predict</code></pre>
{"".join(parts)}
<h2>An image's answer</h2>
<pre><code>{html.escape(schema)}</code></pre>
</main>
</body>
</html>
"""
