"""The figures of compiled steps that must not grow: FLOPs, bytes, memory, instructions that copy.

tests/golden/programs.json has those of the jax that constraints.txt names. Where a change makes one
better, or a config has become another one:

    RENEW=1 python -m pytest tests/test_plan.py tests/test_programs.py --all -k "plan or program"
"""

import json
import os
import re
from typing import Any

import jax
import runs

from vision_jax import cost

GOLDEN = runs.ROOT / "tests/golden/programs.json"
SLACK = {
    "gflop": 1.001,
    "megabytes": 1.02,
    "temporary": 1.05,
    "copies": 1.0,
}  # XLA decides a little by the machine
MOVES = {"copy", "transpose"}
IDLE = {"parameter", "bitcast", "reshape", "get-tuple-element", "tuple", "constant", "convert"}


def check(name: str, compiled: Any) -> None:
    """Fails if the step `name` has become worse; says nothing of another jax or other flags."""
    pinned = re.search(r"^jax==(\S+)", (runs.ROOT / "constraints.txt").read_text(), re.M)
    if pinned is None or jax.__version__ != pinned[1] or "USUAL_XLA_FLAGS" in os.environ:
        return
    found = measure(compiled)
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if "RENEW" in os.environ:
        golden[name] = found
        GOLDEN.write_text(json.dumps(dict(sorted(golden.items())), indent=1) + "\n")
    for figure, most in golden.get(name, {}).items():
        assert found[figure] <= SLACK[figure] * most, (
            f"{figure} of the step of {name} was {most} and is {found[figure]}; where that is "
            'meant: RENEW=1 python -m pytest tests/test_plan.py tests/test_programs.py --all -k "'
            'plan or program"'
        )


def measure(compiled: Any) -> dict[str, float]:
    """Figures of one device."""
    return {
        "gflop": round(cost.count(compiled).flops / 1e9, 6),
        "megabytes": round(compiled.cost_analysis()["bytes accessed"] / 1e6, 3),
        "temporary": round(compiled.memory_analysis().temp_size_in_bytes / 1e6, 3),  # megabytes
        "copies": copies(compiled.as_text()),
    }


def copies(text: str) -> int:
    """Instructions of a compiled module that do nothing but move data, fusions among them."""
    computations, _ = cost._computations(text)
    ops = {name: {op for _, _, op, _ in lines} for name, lines in computations.items()}
    fused = {
        called
        for lines in computations.values()
        for _, _, op, rest in lines
        if op == "fusion"
        for called in cost._called(rest)
    }

    def moves(op: str, rest: str) -> bool:
        inside = set[str]().union(*(ops[name] for name in cost._called(rest)))
        return op in MOVES or (op == "fusion" and inside <= MOVES | IDLE and bool(inside & MOVES))

    lines = (line for name, every in computations.items() if name not in fused for line in every)
    return sum(moves(op, rest) for _, _, op, rest in lines)
