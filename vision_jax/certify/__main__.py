"""Certificates: proof, number by number, that an imported model computes what its source computes.

    python -m vision_jax.certify timm/resnet50
    python -m vision_jax.certify timm/resnet50 --weights=model.safetensors
    python -m vision_jax.certify --all --jobs=2
    python -m vision_jax.certify --render

NAME is one of docs/zoo.md, or any timm/ARCHITECTURE or torchvision/BUILDER. The PyTorch reference
has random weights with every statistic randomized, or those of --weights. docs/certificates.md says
what a certificate proves and how to read one. Needs pip install 'vision_jax[parity]'.
"""

import gc
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from vision_jax.certify.render import TABLE, render
from vision_jax.certify.zoo import certify_all, find_entry, write_certificate
from vision_jax.errors import UserError
from vision_jax.flags import make_parser, run

CERTIFICATES = Path("docs/certificates")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 if a certificate fails, 2 for bad input."""
    return run(lambda: _main(arguments), "such a model", at_once=False)


def _main(arguments: Sequence[str] | None) -> int:
    parser = make_parser("python -m vision_jax.certify", __doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="for example timm/resnet50")
    parser.add_argument(
        "--weights", help="a file with weights of the PyTorch reference; random ones without"
    )
    parser.add_argument(
        "--out", type=Path, help=f"where certificates go; {CERTIFICATES} by default"
    )
    parser.add_argument("--seed", type=int, default=0, help="of random weights and images")
    parser.add_argument("--all", action="store_true", help="the whole zoo")
    parser.add_argument("--only", default="", help="with --all: names that this expression matches")
    parser.add_argument("--jobs", type=int, default=1, help="with --all: processes at a time")
    parser.add_argument(
        "--again", action="store_true", help="with --all: also those that are there"
    )
    parser.add_argument(
        "--render", action="store_true", help=f"write {TABLE} from the certificates"
    )
    flags = parser.parse_args(arguments)
    out = flags.out or CERTIFICATES
    if not (flags.names or flags.all or flags.render):
        raise UserError("name a variant, or give --all or --render; see --help")
    if flags.weights and len(flags.names) != 1:
        raise UserError("--weights goes with one NAME")
    failed = 0
    if flags.names or flags.all:
        _check_libraries()
    if flags.all:
        failed += certify_all(flags.only, flags.jobs, out, flags.again)
    for name in flags.names:
        failed += not _certify_one(name, flags.weights, flags.seed, out)
        gc.collect()
    if flags.render:
        TABLE.write_text(render(out))
        print(f"wrote {TABLE}")
    return 1 if failed else 0


def _certify_one(name: str, weights: str | None, seed: int, out: Path) -> bool:
    """Writes one certificate and prints its verdict, which is returned."""
    from vision_jax.certify.measure import certify

    entry = find_entry(name)
    try:
        certificate = certify(entry, weights, seed=seed)
    except UserError as error:
        print(f"FAIL {name}: {error}", flush=True)
        return False
    path = write_certificate(certificate, out)
    worst = ", ".join(f"{dtype} {error:.1e}" for dtype, error in certificate["worst"].items())
    verdict = "PASS" if certificate["pass"] else "FAIL"
    reasons = "".join(f"; {reason}" for reason in certificate["reasons"])
    print(f"{verdict} {name}: {worst}{reasons}; wrote {path}", flush=True)
    return certificate["pass"]


def _check_libraries() -> None:
    for name in ("timm", "torch", "torchvision", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is missing: pip install 'vision_jax[parity]'")


if __name__ == "__main__":
    sys.exit(main())
