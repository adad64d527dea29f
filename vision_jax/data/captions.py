"""Images with a caption each, and captions as tokens.

    FILE.csv                  a header `path,caption`, paths in the file's folder; an image may have
                              several lines
    FILE.jsonl                {"path": ..., "caption": ...} a line, likewise
    shards, .tar or .parquet  with a .txt of each image, or a column of texts; see sources.py
    any source with labels    see sources.py; the captions are made of class names and templates

Tokens are those of the `tokenizers` library: of somebody's tokenizer.json or spiece.model, or of
one that is trained on the captions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vision_jax.data import sentencepiece_model
from vision_jax.data.sources import (
    PATH_NAMES,
    Source,
    is_of_shards,
    read_captioned_shards,
    read_pairs,
    read_source,
)
from vision_jax.errors import UserError
from vision_jax.files import expand

LISTS = (".csv", ".jsonl")
PAD, END = "<pad>", "</s>"  # of a tokenizer that is trained here; their numbers are 0 and 1
PADS = (PAD, "[PAD]", "<|endoftext|>", END)  # what pads in a tokenizer that doesn't say
BYTES = 256  # that a tokenizer begins with
TOKENIZER_FILE, SENTENCEPIECE_FILE = "tokenizer.json", "spiece.model"


@dataclass(frozen=True)
class CaptionedSource(Source):
    """A source whose examples also have "tokens" i32[L].

    Attributes:
      captions: of each row of what `reader` reads.
      tokens: i32[R, L], of the captions; None before they are tokenized.
      tokenizer: what made them, the contents of its tokenizer.json.
    """

    captions: tuple[str, ...] = ()
    tokens: np.ndarray | None = None
    tokenizer: str = ""

    def open(self, i: int) -> dict[str, Any]:
        """As a source's, with the tokens of the caption if there are any."""
        own = {} if self.tokens is None else {"tokens": self.tokens[self.rows[i]]}
        return super().open(i) | own

    def caption(self, i: int) -> str:
        """Of example i."""
        return self.captions[int(self.rows[i])]


def read_captioned(
    spec: str,
    *,
    path_column: str = "",
    caption_column: str = "caption",
    templates: Sequence[str] = ("{}",),
) -> CaptionedSource:
    """Images with their captions, not yet tokenized; no image is read.

    Args:
      spec: a list of images and captions, shards with captions, or a source with labels.
      path_column: of a list; "" takes the usual names.
      caption_column: of a list or of Parquet files; "" makes captions of labels.
      templates: of captions of classes; row i takes the one of i modulo their number.

    Raises:
      UserError: what the readers refuse, a line without image or caption by file and line.
    """
    path = expand(spec) if spec else Path()
    if caption_column and path.suffix in LISTS and path.is_file():
        names = (path_column.lower(),) if path_column else PATH_NAMES
        if path.suffix == ".jsonl" and path_column:
            names = (path_column,)
        column = caption_column.lower() if path.suffix == ".csv" else caption_column
        reader, captions = read_pairs(path, names, column)
        rows = np.arange(len(captions))
        labels = np.zeros(len(captions), np.int32)
        return CaptionedSource(str(path), (), labels, rows, reader, captions=tuple(captions))
    if caption_column and spec and is_of_shards(spec):
        found, captions, note = read_captioned_shards(spec, caption_column)
        rows = np.arange(len(captions))
        labels = np.zeros(len(captions), np.int32)
        return CaptionedSource(spec, (), labels, rows, found, note, tuple(captions))
    source = read_source(spec)
    made = [""] * (int(source.rows.max()) + 1)
    for place, (row, label) in enumerate(zip(source.rows, source.labels, strict=True)):
        template = templates[place % len(templates)]
        made[row] = template.replace("{}", source.class_names[label])
    labels = np.zeros(len(source), np.int32)
    return CaptionedSource(
        source.name, (), labels, source.rows, source.reader, source.note, tuple(made)
    )


def tokenized(source: CaptionedSource, tokenizer: Any, length: int) -> CaptionedSource:
    """The source with the tokens of its captions; its note says how many were too long."""
    tokens, cut = _encode(tokenizer, source.captions, length)
    notes = [source.note] if source.note else []
    if count := int(cut[source.rows].sum()):
        notes.append(f"{count} of {len(source)} captions are cut at {length} tokens")
    return replace(
        source, tokens=tokens, tokenizer=tokenizer.to_str(pretty=True), note="; ".join(notes)
    )


# Tokenizers ---------------------------------------------------------------------------------------


def load_tokenizer(spec: str) -> Any:
    """The tokenizers.Tokenizer of a tokenizer.json, a spiece.model, or a folder that has either.

    Raises:
      UserError: none there, a damaged file, or the library is missing.
    """
    library = _library()
    path = expand(spec)
    if path.is_dir():
        if not (path / TOKENIZER_FILE).is_file() and (path / SENTENCEPIECE_FILE).is_file():
            path = path / SENTENCEPIECE_FILE
        else:
            path = path / TOKENIZER_FILE
    if not path.is_file():
        raise UserError(f"config.text.tokenizer {spec}: there is no {path}: give a tokenizer.json")
    if path.suffix == ".model":
        return sentencepiece_model.load(path, library)
    try:
        return library.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare exceptions
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(f"{path}: the tokenizers library can't read it ({reason})") from None


def read_tokenizer(text: str) -> Any:
    """The tokenizers.Tokenizer of the contents of a tokenizer.json."""
    return _library().Tokenizer.from_str(text)


def train_tokenizer(captions: Sequence[str], vocab_size: int) -> Any:
    """Byte-pair encoding of captions in lower case: no text is unknown, the same every time.

    Args:
      captions: of the training images.
      vocab_size: different tokens at most, the 256 bytes, the padding and the end among them.

    Raises:
      UserError: fewer tokens than these, or the library is missing.
    """
    library = _library()
    if vocab_size < BYTES + 2:
        raise UserError(
            f"config.text.vocab_size {vocab_size}: a tokenizer of one's own has at least "
            f"{BYTES + 2} tokens, all bytes, padding and end"
        )
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.normalizer = library.normalizers.Sequence(
        [library.normalizers.NFKC(), library.normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(captions), trainer)
    tokenizer.post_processor = library.processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(PAD), pad_token=PAD)
    return tokenizer


def tokenize(tokenizer: Any, texts: Sequence[str], length: int) -> np.ndarray:
    """i32[N, L]: the texts' tokens, cut or padded at the right to `length`.

    Raises:
      UserError: a tokenizer that doesn't say what pads.
    """
    return _encode(tokenizer, texts, length)[0]


def _encode(tokenizer: Any, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens i32[N, L], bool[N]: which texts were cut)."""
    padding = tokenizer.padding or {}
    pad = padding.get("pad_token") or next(
        (name for name in PADS if tokenizer.token_to_id(name) is not None), None
    )
    number = padding.get("pad_id", None if pad is None else tokenizer.token_to_id(pad))
    if number is None:
        raise UserError(
            f"config.text.tokenizer: it has no padding, nor a token of {', '.join(PADS)}: say in "
            f"{TOKENIZER_FILE} what pads"
        )
    tokenizer.enable_padding(pad_id=number, pad_token=pad, length=length)
    tokenizer.enable_truncation(length)
    found = tokenizer.encode_batch(list(texts))
    tokens = np.array([one.ids for one in found], np.int32).reshape(len(texts), length)
    return tokens, np.array([bool(one.overflowing) for one in found], bool)


def _library() -> Any:
    try:
        import tokenizers
        from tokenizers import (  # noqa: F401  # parts that the package does not import by itself
            decoders,
            models,
            normalizers,
            pre_tokenizers,
            processors,
            trainers,
        )
    except ImportError as error:
        raise UserError(
            "captions: run `pip install 'vision_jax[text]'` to tokenize them"
        ) from error
    return tokenizers
