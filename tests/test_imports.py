"""What may import what."""

import ast
import dataclasses
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import runs

from vision_jax.trees import leaf

PACKAGE = runs.ROOT / "vision_jax"
FILES = sorted([*PACKAGE.rglob("*.py"), *(runs.ROOT / "configs").glob("*.py")])


def imported(path: Path) -> set[str]:
    """The top packages that a file imports, anywhere in it."""
    return imported_by(ast.parse(path.read_text()))


def imported_by(tree: ast.AST) -> set[str]:
    """The top packages that a piece of source imports."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(str(node.module).split(".")[0])
    return names


@pytest.mark.long
def test_flax_is_imported_by_models_alone():
    users = {path.relative_to(PACKAGE).parts[0] for path in FILES if "flax" in imported(path)}
    assert users == {"models"}


@pytest.mark.long
def test_torch_and_its_libraries_are_imported_where_their_files_are_read_or_certified():
    """At the top of certify's files alone; elsewhere in the function that needs them."""
    libraries = {"torch", "torchvision", "timm", "transformers"}
    outside = [path for path in FILES if path.parent.name != "certify"]
    users = {path.name for path in outside if libraries & imported(path)}
    assert users == {"files.py", "read.py"}
    for path in FILES:
        assert not imported(path) & {"tensorflow", "peft"}
    for path in outside:
        top = ast.Module(
            [
                node
                for node in ast.parse(path.read_text()).body
                if isinstance(node, ast.Import | ast.ImportFrom)
            ],
            [],
        )
        assert not imported_by(top) & libraries, path


def test_the_layers_of_the_package():
    """pyproject.toml states them: nothing climbs, and a ConfigDict goes no deeper than run/."""
    checked = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter import cli; cli.lint_imports_command()",
            "--no-cache",
        ],
        cwd=runs.ROOT,
        env={**os.environ, "PYTHONPATH": str(runs.ROOT)},
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_nobody_outside_trees_names_a_leaf_or_spells_its_inner_paths():
    for module in pkgutil.iter_modules([str(PACKAGE / "trees")]):
        importlib.import_module(f"vision_jax.trees.{module.name}")
    kinds = [
        kind for kind in leaf.Leaf.__subclasses__() if kind.__module__.startswith("vision_jax.")
    ]
    assert "LowRank" in {kind.__name__ for kind in kinds}
    fields = "|".join(field.name for kind in kinds for field in dataclasses.fields(kind))
    kernels = "|".join(name for kind in kinds for name in kind.like_kernel)
    names = "|".join(kind.__name__ for kind in kinds)
    spelled = re.compile(rf"\b({names})\b|kernel/({fields})\b|[\"'}}]/({kernels})\b")
    assert spelled.search('path.endswith("/base")')
    for folder in (PACKAGE, *(runs.ROOT / name for name in ("configs", "benchmarks", "scripts"))):
        for path in folder.rglob("*.py"):
            if path.parent != PACKAGE / "trees":
                found = spelled.search(path.read_text())
                assert not found, f"{path}: {found[0]}: ask vision_jax.trees"


@pytest.mark.long
def test_configs_are_not_asked_for_fields_that_may_be_missing():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("get", "get_ref"):
                owner = ast.unparse(node.value)
                assert not owner.split(".")[0].endswith("config") or "convert" in path.parts, (
                    f"{path}:{node.lineno}: {owner}.{node.attr} swallows typing errors"
                )


def python(program: str) -> str:
    """What a program prints in a process of its own, on one device."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(runs.ROOT),
        "XLA_FLAGS": runs.xla_flags(1),
    }
    child = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    assert child.stderr == ""
    return child.stdout


@pytest.mark.long
def test_the_main_job_loads_what_it_needs_when_it_needs_it(tmp_path):
    """Never torch or TensorFlow; matplotlib when something is drawn, scipy's filters not at all."""
    fields = runs.overrides(total_steps=1, evaluate__every=1)
    arguments = [
        f"--config={runs.ROOT / 'configs/vit_lora.py'}",
        f"--workdir={tmp_path / 'run'}",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]
    program = (
        "import sys, vision_jax\n"
        "from pathlib import Path\n"
        "from vision_jax import main\n"
        "assert 'jax' not in sys.modules  # bad flags are answered at once\n"
        "drawn = []\n"
        "def watch(event, arguments):\n"
        "    if event == 'import' and arguments[0] == 'matplotlib':\n"
        f"        drawn.append(Path({str(tmp_path / 'run/checkpoints/1')!r}).is_dir())\n"
        "sys.addaudithook(watch)\n"
        f"assert main.main({arguments!r}) == 0\n"
        "heavy = 'torch tensorflow torchvision timm transformers scipy.signal scipy.ndimage '\n"
        "heavy += 'scipy.stats pandas tensorboardX tensorflow_datasets'\n"
        "print('loaded:', sorted({*heavy.split()} & set(sys.modules)))\n"
        "print('matplotlib after the last checkpoint:', drawn[0])\n"
    )
    assert python(program).splitlines()[-2:] == [
        "loaded: []",
        "matplotlib after the last checkpoint: True",
    ]


def test_importing_the_package_takes_hardly_more_than_jax():
    """At most 1.2 times its CPU time."""
    program = (
        "from time import process_time\n"
        "start = process_time()\n"
        "import jax\n"
        "of_jax = process_time() - start\n"
        "import vision_jax\n"
        "print((process_time() - start) / of_jax)\n"
    )
    assert float(python(program)) <= 1.2
