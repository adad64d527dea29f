"""The findings as a person reads them."""

from collections.abc import Sequence

from rich.console import Group
from rich.padding import Padding
from rich.text import Text

from vision_jax.doctor.finding import Finding, Subject, counted
from vision_jax.errors import UserError, printable

EXAMPLES = 3  # printed of each finding
MARKS = {"error": ("✗", "bold red"), "warning": ("!", "bold yellow"), "information": ("·", "cyan")}


def report(
    subject: Subject, other: Subject | None, findings: Sequence[Finding], *, quick: bool
) -> Group:
    parts: list[Text | Padding] = [_heading(subject)]
    if other is not None:
        parts.append(_heading(other))
    for finding in findings:
        mark, style = MARKS[finding.level]
        count = f"{finding.count:,} of {counted(finding.of, finding.unit)}"
        count += f", {_percent(finding.count, finding.of)} %"
        count += "; training refuses" * (finding.training == "refuses")
        lines = [(6, example, "dim") for example in finding.examples[:EXAMPLES]]
        more = finding.count - len(lines)
        lines += [(6, f"… and {more:,} more", "dim")] * (more > 0 and bool(lines))
        parts += [Text(), Text.assemble((f"{mark} {finding.code}", style), f": {count}")]
        for indent, line, look in ((2, finding.title, ""), *lines, (2, f"→ {finding.advice}", "")):
            text = Text(str(UserError(line)), style=look, overflow="fold")  # names hold anything
            parts.append(Padding(text, (0, 0, 0, indent), expand=False))
    levels = [finding.level for finding in findings]
    counts = [(levels.count(level), level) for level in ("error", "warning")]
    bad = [f"{count} {level}{'s' * (count > 1)}" for count, level in counts if count]
    if bad:
        verdict = Text(f"Found: {' and '.join(bad)}.", "bold red")
        if any(finding.training == "refuses" for finding in findings):
            verdict.append(" Training refuses such data.")
    else:
        verdict = Text("Nothing is wrong with it, as far as can be seen.", "bold green")
    if quick:
        verdict.append(" Only headers were read (--quick): no search for images in both splits.")
    return Group(*parts, Text(), verdict)


def _heading(subject: Subject) -> Text:
    counts = [counted(len(subject.paths), "images")]
    if subject.annotations is not None:
        counts.append(counted(len(subject.annotations.box_image), "boxes"))
    counts.append(counted(len(subject.class_names), "classes"))
    return Text.assemble((printable(subject.name), "bold"), f": {', '.join(counts)}")


def _percent(count: int, total: int) -> str:
    """A share for people: 100 only of all, 0 only of nothing.

    Examples:
      >>> [_percent(*pair) for pair in ((3, 3), (999, 1000), (2, 3), (1, 30), (1, 10**6), (0, 3))]
      ['100', '99.9', '67', '3.3', 'below 0.01', '0']
    """
    share = 100 * count / max(total, 1)
    if count >= total > 0:
        return "100"
    if share >= 99:
        return f"{min(share, 99.9):.1f}"
    if share >= 10:
        return f"{share:.0f}"
    return f"{share:.2g}" if share >= 0.01 or not count else "below 0.01"
