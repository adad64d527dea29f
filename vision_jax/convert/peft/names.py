"""Names in PEFT's files, and the modules that they stand for."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from vision_jax.convert.engine import CONV, FUSE_LINEAR, LINEAR, POINTWISE, Rule
from vision_jax.convert.table import Arguments, Table
from vision_jax.convert.tables import TABLES, naming_for_export, own_naming
from vision_jax.convert.vit.names import JOIN_LINEAR
from vision_jax.errors import UserError

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
A, B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
BIAS = ".lora_B.bias"

# What torch.compile and wrappers of a module put into the names of what is inside.
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def unwrapped(name: str) -> str:
    """A tensor's name in the base model, without what wrappers and adapters add.

    Examples:
      >>> unwrapped("base_model.model._orig_mod.head.base_layer.bias")
      'head.bias'
    """
    name = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    name = name.removeprefix(PREFIX).replace(".base_layer.", ".")
    return name.replace(".modules_to_save.", ".")


def is_left_over(name: str, tensors: Collection[str]) -> bool:
    """Whether a tensor is written beside the one that counts, as bias="all" does of saved modules.

    Of the head's bias the file then has the old one, the new one, and the new one once more under
    the name that is read.
    """
    counts = name.replace(".modules_to_save.", ".").replace(".original_module.", ".")
    return name != counts and (counts in tensors or ".original_module." in name)


def table_in_memory(naming: str, family: str, arguments: Arguments) -> Table:
    """How the source names the modules of such a model, which may differ from its files' names."""
    table = naming_for_export(naming, family, arguments)
    kinds = (f"{table.kind} in memory", f"{table.kind}, in memory")
    for other in TABLES:
        if (other.source, other.family) == (table.source, family) and other.kind in kinds:
            return other.with_prefix(table.prefixes[0])
    return table


def rules_of(table: Table, arguments: Arguments, arrays: Collection[str]) -> list[Rule]:
    """The table's rules for the arrays that there are."""
    return [
        rule
        for rule in table.rules(arguments)
        if isinstance(rule, Rule) and all(path in arrays for path in rule.paths)
    ]


@dataclass(frozen=True)
class Owners:
    """The modules of PyTorch's that a kernel is made of: one, or those of q, k and v.

    Attributes:
      names: of the modules.
      pointwise: whether it is a convolution with a window of 1 x 1 there, and dense here.
    """

    names: tuple[str, ...]
    pointwise: bool


def owners_of(rules: Sequence[Rule]) -> dict[str, Owners]:
    """The modules by the path of the kernel that they make."""
    return {
        rule.paths[0]: Owners(
            tuple(name.removesuffix(".weight") for name in rule.names), rule.layout is POINTWISE
        )
        for rule in rules
        if rule.layout in (LINEAR, CONV, POINTWISE, FUSE_LINEAR, JOIN_LINEAR)
        and rule.names[0].endswith(".weight")
    }


def without_module(kernels: Collection[str], family: str, arguments: Arguments) -> list[str]:
    """Those of the kernels that are no module in the naming of a run's own files.

    YOLOX' stem is one: two pixels a side are channels there, before a window of 3 x 3.
    """
    table = table_in_memory(own_naming(family), family, arguments)
    rules = [rule for rule in table.rules(arguments) if isinstance(rule, Rule)]
    return sorted(set(kernels) - owners_of(rules).keys())


def recognize(
    tables: Sequence[Table],
    naming: str,
    arguments: Arguments,
    found: Collection[str],
    saved: Collection[str],
    arrays: Collection[str],
    origin: str,
) -> list[Rule]:
    """The rules of the first naming that knows every module and every saved tensor."""
    fewest: list[str] | None = None
    for table in tables:
        if naming not in ("auto", table.source):
            continue
        for prefix in table.prefixes:
            rules = rules_of(table.with_prefix(prefix), arguments, arrays)
            modules = {name for owners in owners_of(rules).values() for name in owners.names}
            names = {name for rule in rules for name in rule.names}
            unknown = [name for name in found if name not in modules]
            unknown += [name for name in saved if name not in names]
            if not unknown:
                return rules
            if fewest is None or len(unknown) < len(fewest):
                fewest = unknown
    if fewest is None:
        raise UserError(f"naming {naming!r}: use auto, timm, transformers or torchvision")
    raise UserError(
        f"{origin}: {len(fewest)} names of the adapter have no place in this model: "
        f"{', '.join(sorted(fewest)[:5])}; it must be for the same architecture and depth"
    )
