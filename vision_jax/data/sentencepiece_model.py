"""SentencePiece's `spiece.model`, as which SigLIP's and T5's tokenizers come, as a tokenizer.json.

The model is Kudo's unigram model (2018, https://arxiv.org/abs/1804.10959), which the `tokenizers`
library has too: pieces and their log-probabilities, and a table that normalizes characters, are
taken over as they are, and nothing of a run needs SentencePiece afterwards.

Exactness, where ports go wrong:
  - SigLIP's texts are lowered and lose their ASCII punctuation before the model sees them
    (big_vision, transformers 5.24 SiglipTokenizer.canonicalize_text), T5's do not;
  - both end with `</s>`, and SigLIP pads with it, T5 with `<pad>`: tokenizer_config.json says so;
  - a text begins with "▁", the first word's as any other's.
"""

from pathlib import Path
from typing import Any

from vision_jax.errors import UserError
from vision_jax.files import read_bytes, read_json

CONFIG_FILE = "tokenizer_config.json"
SIGLIP = "SiglipTokenizer"
END = "</s>"
MAX_BYTES = 2**26  # of a file; one of 256,000 pieces has 4 MB
UNIGRAM = 1  # TrainerSpec.model_type
PUNCTUATION = r"[!-/:-@\[-`{-~]"  # Python's string.punctuation
SPACE = "▁"


def load(path: Path, library: Any) -> Any:
    """The tokenizers.Tokenizer of a SentencePiece file.

    Args:
      path: of the file. A tokenizer_config.json beside it says whose it is; without one it is
        SigLIP's.
      library: the module `tokenizers`.

    Raises:
      UserError: a damaged file, a model of another kind, or SentencePiece is missing.
    """
    model = _parse(path)
    if model.trainer_spec.model_type != UNIGRAM:
        raise UserError(
            f"{path} is no unigram model, as SigLIP's and T5's are: write its tokenizer.json with "
            "the library that it comes with"
        )
    settings = _settings(path.parent / CONFIG_FILE)
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    numbers = {name: number for number, (name, _) in enumerate(pieces)}
    pad = settings["pad_token"]
    for name in (END, pad):
        if name not in numbers:
            raise UserError(f"{path} has no piece {name!r}, which ends or pads a text")
    tokenizer = library.Tokenizer(
        library.models.Unigram(
            pieces,
            unk_id=model.trainer_spec.unk_id,
            byte_fallback=model.trainer_spec.byte_fallback,
        )
    )
    tokenizer.normalizer = _normalizer(model.normalizer_spec, settings, library)
    if model.normalizer_spec.add_dummy_prefix:
        tokenizer.pre_tokenizer = library.pre_tokenizers.Metaspace(
            replacement=SPACE, prepend_scheme="always", split=False
        )
    tokenizer.decoder = library.decoders.Metaspace(replacement=SPACE)
    tokenizer.post_processor = library.processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, numbers[END])]
    )
    tokenizer.enable_padding(pad_id=numbers[pad], pad_token=pad)
    return tokenizer


def _parse(path: Path) -> Any:
    """The message ModelProto of a file that SentencePiece itself accepts."""
    try:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise UserError(
            f"{path} is SentencePiece's: run `pip install 'vision_jax[text]'` to read it"
        ) from error
    messages: Any = sentencepiece_model_pb2  # its classes are made when it is imported
    content = read_bytes(path, MAX_BYTES)
    try:
        sentencepiece.SentencePieceProcessor().LoadFromSerializedProto(content)
        return messages.ModelProto.FromString(content)
    except Exception as error:  # the libraries raise RuntimeError and errors of their own
        raise UserError(f"{path}: SentencePiece can't read it; it may be damaged") from error


def _settings(path: Path) -> dict[str, Any]:
    """What a tokenizer_config.json says of texts: "lower", "pad_token"."""
    said = read_json(path) if path.is_file() else {"tokenizer_class": SIGLIP}
    if not isinstance(said, dict):
        raise UserError(f"{path} is no tokenizer's config: an object is expected")
    siglip = said.get("tokenizer_class") in (SIGLIP, f"{SIGLIP}Fast")
    pad = said.get("pad_token") or (END if siglip else "<pad>")
    pad = pad.get("content") if isinstance(pad, dict) else pad  # as older versions wrote it
    lower = said.get("do_lower_case", True) if siglip else False
    return {"canonical": siglip, "lower": bool(lower), "pad_token": pad}


def _normalizer(spec: Any, settings: dict[str, Any], library: Any) -> Any:
    """What happens to a text before it is cut into pieces, in this order."""
    normalizers, regex = library.normalizers, library.Regex
    steps = []
    if settings["lower"]:
        steps.append(normalizers.Lowercase())
    if settings["canonical"]:
        steps.append(normalizers.Replace(regex(PUNCTUATION), ""))
        steps.append(normalizers.Replace(regex(r"\s+"), " "))
        steps.append(normalizers.Strip())
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(regex(" {2,}"), " "))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)
