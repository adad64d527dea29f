"""What is known of each field of a source's config.json: nothing that it says is passed over.

A field is used by the reader of its family, shows in the tensors, changes nothing that inference
computes, or may have one value only. Whatever else the source's own config class does not know
either is named for people, since the source passes it over too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vision_jax.errors import UserError

# Of every config of transformers: outputs, labels, texts, how its file was made.
_EVERY = (
    "architectures attn_implementation _attn_implementation_autoset chunk_size_feed_forward "
    "dtype finetuning_task gradient_checkpointing id2label is_encoder_decoder label2id model_type "
    "_name_or_path num_labels output_attentions output_hidden_states problem_type return_dict "
    "tie_word_embeddings torch_dtype torchscript transformers_version use_bfloat16 use_cache"
)


@dataclass(frozen=True)
class Fields:
    """The fields of one config, or of several classes whose files one table reads.

    Attributes:
      types: the values of model_type whose arithmetic is this; () for any.
      used: the reader takes them.
      seen: the tensors show them, and must agree where `Table.config` says what they show.
      free: they change nothing of what the model computes.
      only: field -> the values that the model computes with.
      inner: field -> the fields of the object in it.
    """

    types: tuple[str, ...] = ()
    used: str = ""
    seen: str = ""
    free: str = ""
    only: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    inner: Mapping[str, "Fields"] = field(default_factory=dict)

    @property
    def known(self) -> frozenset[str]:
        """Names of all fields that a config of these types may have."""
        texts = f"{_EVERY} {self.used} {self.seen} {self.free}".split()
        return frozenset((*texts, *self.only, *self.inner))


def check_values(config: Mapping[str, Any], fields: Fields, within: str = "") -> list[str]:
    """Names of fields that neither the source nor this reader knows.

    Raises:
      UserError: a value that changes the arithmetic to what the model cannot compute.
    """
    said = config.get("model_type", None)
    if fields.types and said is not None and said not in fields.types:
        raise UserError(
            f"config.json: {within}model_type {said!r} is none of {', '.join(fields.types)}, "
            "whose tensors these are: it may compute otherwise"
        )
    for name, values in fields.only.items():
        if name in config and config[name] not in values:
            raise UserError(
                f"config.json: {within}{name} {config[name]!r} is not supported: this model "
                f"computes with {' or '.join(map(repr, values))}"
            )
    unknown = [f"{within}{name}" for name in config if name not in fields.known]
    for name, inner in fields.inner.items():
        content = config.get(name)
        if isinstance(content, dict):
            unknown += check_values(content, inner, f"{name}.")
        elif content is not None:
            raise UserError(f"config.json: {within}{name} {content!r} is not an object")
    return unknown


def check_seen(
    config: Mapping[str, Any], fields: Fields, shown: Mapping[str, Any], within: str = ""
) -> None:
    """Checks a config against what the tensors show, `shown`, where that is told.

    Raises:
      UserError: they differ: the source would build another model.
    """
    for name in fields.seen.split():
        told, given = shown.get(name), config.get(name)
        if told is not None and given is not None and _plain(told) != _plain(given):
            raise UserError(
                f"config.json: {within}{name} {given!r}, and the tensors are of {told!r}: one of "
                "them is another model's"
            )
    for name, inner in fields.inner.items():
        if isinstance(config.get(name), dict):
            part = shown.get(name)
            check_seen(config[name], inner, part if isinstance(part, dict) else shown, f"{name}.")


def _plain(value: Any) -> Any:
    """Lists for tuples, and one number for the two equal sides of a square."""
    if isinstance(value, list | tuple):
        sides = [_plain(entry) for entry in value]
        return sides[0] if len(sides) == 2 and sides[0] == sides[1] else sides
    return value
