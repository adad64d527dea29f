"""The variants that are certified: one by its name, or the whole zoo in processes of its own."""

import difflib
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import vision_jax
from vision_jax.convert.table import Entry
from vision_jax.convert.tables import ZOO
from vision_jax.errors import UserError


def find_entry(name: str) -> Entry:
    """The zoo's entry, or one made for any other architecture of timm or builder of torchvision.

    Raises:
      UserError: no such name; with the nearest ones.
    """
    for entry in ZOO:
        if entry.name == name:
            return entry
    source, _, build = name.partition("/")
    if source == "timm":
        import timm

        if build in timm.list_models():
            size = timm.get_pretrained_cfg(build).input_size[-1]
            return Entry(name, "timm", build, image_size=size, published=f"timm://{build}")
    if source == "torchvision":
        import torchvision

        if build in torchvision.models.list_models():
            return Entry(name, "torchvision", build, published=f"torchvision://{build}")
    near = difflib.get_close_matches(name, [entry.name for entry in ZOO], n=3)
    hint = f": did you mean {', '.join(near)}?" if near else ""
    raise UserError(f"{name} is not in the zoo{hint}; docs/zoo.md lists it")


def write_certificate(certificate: Mapping[str, Any], folder: Path) -> Path:
    """Writes NAME.json, numbers rounded to what they mean."""
    path = folder / f"{certificate['name']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_rounded(certificate), indent=1, sort_keys=True) + "\n")
    return path


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.3g}")
    if isinstance(value, Mapping):
        return {str(name): _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def certify_all(only: str, jobs: int, out: Path, again: bool) -> int:
    """Certificates of the whole zoo, each in a process of its own; returns how many failed."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    names = [entry.name for entry in ZOO if re.search(only, entry.name)]
    if not again:
        names = [name for name in names if not _is_current(out / f"{name}.json")]
    if not names:
        print("nothing to do: every certificate is there and of this version; --again repeats them")
        return 0
    # A process certifies several, so that it compiles what they share once, but not all, so that
    # memory is given back.
    chunks = [names[start : start + 8] for start in range(0, len(names), 8)]
    failed: list[str] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn()) as progress:
        task = progress.add_task("certificates", total=len(names))

        def run(chunk: Sequence[str]) -> None:
            command = [sys.executable, "-m", "vision_jax.certify", *chunk, f"--out={out}"]
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            ) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    if not line.startswith(("PASS", "FAIL", "error:")):
                        continue
                    progress.console.print(
                        line.rstrip(), highlight=False, markup=False, soft_wrap=True
                    )
                    if not line.startswith("error:"):
                        progress.advance(task)
                    if not line.startswith("PASS"):
                        failed.append(line)

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(run, chunks))
    print(f"{len(names) - len(failed)} of {len(names)} pass; written under {out}")
    return len(failed)


def _is_current(path: Path) -> bool:
    if not path.is_file():
        return False
    record = json.loads(path.read_text())
    return record["pass"] and record["versions"]["vision_jax"] == vision_jax.__version__
