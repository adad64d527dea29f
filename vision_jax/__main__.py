"""Says what commands there are, and runs one: `python -m vision_jax COMMAND or MODE ...`."""

import runpy
import sys

from vision_jax.errors import nearest
from vision_jax.main import BAD_INPUT, MODES, command

COMMANDS = {
    "main": "train or resume a run, and all modes below",
    "config": "print every field of a config, with its value and a line of help",
    "doctor": "examine a data set before training",
    "convert": "turn weights or a run into files of timm, torchvision or transformers",
    "certify": "compare an imported model with its source, number by number",
}


def help_text() -> str:
    """What `python -m vision_jax` prints."""
    lines = ["Fine-tune large vision models in JAX, from anybody's PyTorch weights.", ""]
    for name, what in COMMANDS.items():
        lines.append(f"  python -m vision_jax.{name:8}  {what}")
    lines += ["", "Modes of vision_jax.main, with --mode=NAME:", ""]
    lines += [f"  {name:11} {what}" for name, what in MODES.items()]
    lines += [
        "",
        "Each command has --help. To begin:",
        "",
        "  python -m vision_jax.main --config=configs/vit_lora.py",
    ]
    return "\n".join(lines)


def main() -> int:
    """Runs the command of the command line; returns the exit code."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help"):
        print(help_text())
        return 0
    if name in MODES:
        name, rest = "main", [f"--mode={name}", *rest]
    if name not in COMMANDS:
        hint = nearest(name, [*COMMANDS, *MODES]).removeprefix(": ")
        print(
            f"error: there is no command {name!r}; {hint or '--help lists them'}", file=sys.stderr
        )
        return BAD_INPUT
    sys.argv[1:] = rest
    if name == "main":
        command()
        return 0
    runpy.run_module(f"vision_jax.{name}", run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
