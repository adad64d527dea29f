"""SentencePiece's files as tokenizers, beside SentencePiece itself."""

import io
import json
import string

import pytest

from vision_jax.data import captions
from vision_jax.errors import UserError

sentencepiece = pytest.importorskip("sentencepiece")

WORDS = ("a", "photo", "of", "the", "grünes", "T-shirt", "ﬁne", "naïve", "１２", "日本", "don't")
T5 = {"tokenizer_class": "T5Tokenizer"}
NUMBERS = {"unk_id": 2, "eos_id": 1, "bos_id": -1, "pad_id": 0}  # T5's and SigLIP's


def write(folder, rng, config=None, **options):
    """Trains a small model and writes it; returns SentencePiece's own reader of it."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([phrase(rng) for _ in range(200)]),
        model_writer=file,
        **{"vocab_size": 600, "hard_vocab_limit": False, "minloglevel": 2, "num_threads": 1},
        **{**NUMBERS, **options},
    )
    (folder / "spiece.model").write_bytes(file.getvalue())
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())


def phrase(rng):
    return " ".join(rng.choice(WORDS, rng.integers(1, 9)))


def texts(rng):
    """Some that were trained on and some that nobody would write."""
    odd = list("abcdefgh  ABC.,!'-_ ﬁéÅ日🟩\t１▁")
    wild = ["".join(rng.choice(odd, rng.integers(30))) for _ in range(200)]
    return [phrase(rng) for _ in range(50)] + wild + ["", "  ", "!!!", " lead", "trail ", "a  b"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"byte_fallback": True},
        {"normalization_rule_name": "nmt_nfkc_cf"},
        {"unk_id": 0, "eos_id": 2, "bos_id": 1, "pad_id": 3},
    ],
    ids=["t5", "bytes", "folded", "numbers"],
)
def test_the_same_tokens_as_sentencepiece(options, tmp_path, rng):
    theirs = write(tmp_path, rng, T5, **options)
    ours = captions.load_tokenizer(str(tmp_path))
    assert ours.padding["pad_id"] == theirs.pad_id()
    ours.no_padding()
    for text in texts(rng):
        assert ours.encode(text).ids == [*theirs.encode(text), theirs.eos_id()], text


def test_siglips_texts_are_lowered_and_lose_their_punctuation(tmp_path, rng):
    theirs = write(tmp_path, rng)
    ours = captions.load_tokenizer(str(tmp_path / "spiece.model"))
    plain = str.maketrans("", "", string.punctuation)
    for text in texts(rng):
        told = " ".join(text.lower().translate(plain).split())
        found = theirs.encode(told)[:15]
        expected = [*found, *[theirs.eos_id()] * (16 - len(found))]  # it ends with what pads
        assert captions.tokenize(ours, [text], 16)[0].tolist() == expected, text


def test_a_tokenizer_json_says_the_same(tmp_path, rng):
    """What a run writes into its folder."""
    write(tmp_path, rng)
    ours = captions.load_tokenizer(str(tmp_path))
    again = captions.read_tokenizer(ours.to_str())
    for text in texts(rng):
        assert again.encode(text).ids == ours.encode(text).ids


@pytest.mark.parametrize(
    ("options", "config", "message"),
    [
        ({"model_type": "bpe"}, None, "is no unigram model"),
        ({"eos_id": -1}, None, "has no piece '</s>'"),
        ({}, {"pad_token": "[PAD]"}, r"has no piece '\[PAD\]'"),
        ({}, [], "is no tokenizer's config"),
    ],
)
def test_models_that_are_refused(options, config, message, tmp_path, rng):
    write(tmp_path, rng, config, **options)
    with pytest.raises(UserError, match=message) as caught:
        captions.load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x0a\xff", bytes(range(256)) * 9])
def test_damaged_files(content, tmp_path):
    (tmp_path / "spiece.model").write_bytes(content)
    with pytest.raises(UserError, match="SentencePiece can't read it"):
        captions.load_tokenizer(str(tmp_path))
