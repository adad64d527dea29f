"""docs/zoo.md, from the certificates alone."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vision_jax.errors import UserError

TABLE = Path("docs/zoo.md")


def render(folder: Path) -> str:
    """docs/zoo.md from the certificates alone.

    Raises:
      UserError: there are none.
    """
    records = [json.loads(path.read_text()) for path in sorted(folder.rglob("*.json"))]
    if not records:
        raise UserError(f"{folder} has no certificates: make them with --all first")
    passed = sum(record["pass"] for record in records)
    titles = sorted({record["title"] for record in records}, key=str.lower)
    sources = sorted({record["source"] for record in records})
    lines = [
        "# The zoo",
        "",
        "Made by `python -m vision_jax.certify --all` and `--render`; not edited by hand.",
        "",
        f"{len(records)} variants over {len(titles)} families and {len(sources)} sources "
        f"({', '.join(sources)}); {passed} certificates pass.",
        "",
        "Errors are the worst over all named intermediates and the logits, relative to the scale "
        "of each, on random weights with every statistic randomized. Preprocessing is the largest "
        "difference from the source's own, in steps of 1/255. GFLOPs count two for a multiply and "
        "add. What the columns prove: [certificates.md](certificates.md).",
    ]
    for title in titles:
        lines += [
            "",
            f"## {title}",
            "",
            "| name | parameters | GFLOPs | pixels | float32 | float64 | preprocessing | weights | "
            "license |",
            "|---|--:|--:|--:|--:|--:|--:|---|---|",
        ]
        group = [record for record in records if record["title"] == title]
        for record in sorted(group, key=lambda r: (r["source"], r["parameters"])):
            lines.append(_row(record))
    reduced = [record["name"] for record in records if record["reduced"]]
    if reduced:
        lines += [
            "",
            "† certified at reduced depth or of few proposals (the certificate says which); "
            "parameters and GFLOPs are the whole model's.",
        ]
    return "\n".join(lines) + "\n"


def _row(record: Mapping[str, Any]) -> str:
    name = f"[{record['name']}](certificates/{record['name']}.json)"
    cells = (
        name + (" †" if record["reduced"] else "") + ("" if record["pass"] else " **fails**"),
        f"{record['parameters'] / 1e6:.2f} M",
        f"{record['gflops']:.2f}",
        str(record["image_size"]),
        f"{record['worst']['float32']:.1e}",
        f"{record['worst']['float64']:.1e}",
        "" if not record["preprocessing"] else _pixels(record["preprocessing"]),
        f"`{record['published']}`" if record["published"] else "",
        record["license"],
    )
    return f"| {' | '.join(cells)} |"


def _pixels(preprocessing: Mapping[str, Any]) -> str:
    return f"{preprocessing['largest_difference_in_255ths']:g}"
