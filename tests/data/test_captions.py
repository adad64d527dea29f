"""Captions from lists and labels, and their tokens."""

import builtins
import io
import json
import tarfile

import numpy as np
import pyarrow.parquet
import pytest
import runs
from PIL import Image

from vision_jax.data import captions
from vision_jax.data.fingerprint import describe_changes, take_fingerprint
from vision_jax.data.pipeline import DamageLog, make_train_iterator
from vision_jax.data.sources import hold_out, subset
from vision_jax.data.transforms import Preprocessing
from vision_jax.errors import UserError

TEXTS = ["A red square", "a blue one", "A red square", "ein grünes Quadrat 🟩"]


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    return tmp_path


def write(path, text):
    path.write_text(text)
    return str(path)


def test_lists_of_captions(folder):
    """An image may have several lines; other columns are not looked at."""
    comma = write(
        folder / "x.csv", 'path,id,caption\na.png,1,"one, two"\nb.png,2, three \na.png,,4'
    )
    source = captions.read_captioned(comma)
    assert source.captions == ("one, two", "three", "4")
    assert [source.example_name(i) for i in range(3)] == [
        str(folder / name) for name in ("a.png", "b.png", "a.png")
    ]
    assert source.class_names == ()
    lines = [{"image": "b.png", "Text": "zwei"}, {"image": "a.png", "Text": "eins"}]
    jsonl = write(folder / "x.jsonl", "\n".join(map(json.dumps, lines)))
    source = captions.read_captioned(jsonl, path_column="image", caption_column="Text")
    assert [source.caption(i) for i in range(2)] == ["zwei", "eins"]
    tabs = write(folder / "y.csv", "Picture\tText\na.png\teins\n")
    source = captions.read_captioned(tabs, path_column="Picture", caption_column="Text")
    assert source.captions == ("eins",)


def test_captions_of_shards(folder):
    """Of a tar the .txt or the .json's, of Parquet a column; each image has one or is named."""
    image = (folder / "a.png").read_bytes()

    def pack(*files):
        with tarfile.open(folder / "x.tar", "w") as tar:
            for name, data in files:
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
        return str(folder / "x.tar")

    source = captions.read_captioned(
        pack(
            ("1.png", image), ("1.txt", b" one\n"), ("1.cls", b"0"),
            ("2.json", b'{"caption": "two", "label": 1}'), ("2.png", image),
        )
    )  # fmt: skip
    assert (source.captions, source.class_names) == (("one", "two"), ())
    assert source[1]["image"].shape == (8, 8, 3)
    of_labels = captions.read_captioned(
        str(folder / "x.tar"), caption_column="", templates=("a {}",)
    )
    assert of_labels.captions == ("a 0", "a 1")
    with pytest.raises(UserError, match=r"x\.tar/2\.png: has no caption: pack a \.txt"):
        captions.read_captioned(pack(("1.png", image), ("1.txt", b"one"), ("2.png", image)))
    with pytest.raises(UserError, match=r"leave config\.text\.caption_column as it is"):
        captions.read_captioned(str(folder / "x.tar"), caption_column="alt")
    table = {"image": [image, image], "caption": ["one", "two"], "alt": ["x", ""]}
    pyarrow.parquet.write_table(pyarrow.table(table), folder / "x.parquet")
    spec = str(folder / "x.parquet")
    assert captions.read_captioned(spec).captions == ("one", "two")
    for named in ({"spec": f"{spec}:alt"}, {"spec": spec, "caption_column": "alt"}):
        with pytest.raises(UserError, match=r"x\.parquet\[1\]: has no caption: leave its row out"):
            captions.read_captioned(**named)
    with pytest.raises(UserError, match=r"no column txt: name it behind .* alt, caption"):
        captions.read_captioned(spec, caption_column="txt")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.csv", "path,caption\na.png,\n", "x.csv:2: caption '': give the image a text"),
        ("x.csv", "path,caption\na.png\n", "x.csv:2: caption None: give the image a text"),
        ("x.csv", "path,caption\n\nc.png,x\n", "x.csv:3: c.png: no such file in"),
        ("x.csv", "path,label\na.png,x\n", "x.csv:1: no column caption: begin with `path,caption`"),
        ("x.csv", "path,caption\n", "no images are listed: add lines of path and caption"),
        ("x.jsonl", '{"path": "a.png", "caption": 3}', "x.jsonl:1: caption 3: give the image"),
        ("x.jsonl", '{"path": "a.png"}', "x.jsonl:1: caption None: give the image a text"),
        ("x.jsonl", '{"path": "c.png", "caption": "x"}', "x.jsonl:1: c.png: no such file in"),
        ("x.jsonl", "[1]", 'x.jsonl:1: not of the form {"path": ..., "caption": ...}'),
        ("x.jsonl", '{"path": "../a.png", "caption": "x"}', "without `..`"),
    ],
)
def test_a_line_without_image_or_caption_is_named(folder, name, text, message):
    with pytest.raises(UserError) as caught:
        captions.read_captioned(write(folder / name, text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_captions_of_labels_take_the_templates_in_turn(folder):
    spec = f"cifar10:{runs.inputs()}/train"
    source = captions.read_captioned(spec, templates=("a {}", "one {}", "{}!"))
    assert source.captions[:5] == ("a ant", "one bee", "cat!", "a dog", "one ant")
    assert source.class_names == ()
    listed = write(folder / "x.csv", "path,label\na.png,ant\nb.png,{bee}\n")
    source = captions.read_captioned(listed, caption_column="", templates=("a {}",))
    assert source.captions == ("a ant", "a {bee}")


def test_parts_of_a_source_keep_their_captions_and_tokens():
    tokenizer = captions.train_tokenizer(TEXTS, 280)
    source = captions.read_captioned(f"cifar10:{runs.inputs()}/train", templates=("a {}",))
    source = captions.tokenized(source, tokenizer, 12)
    for part in (*hold_out(source, 0.3, 1), subset(source, 9, 2)):
        for i in range(len(part)):
            own = captions.tokenize(tokenizer, [part.caption(i)], 12)[0]
            np.testing.assert_array_equal(part[i]["tokens"], own)
            assert part.caption(i) == f"a {runs.CLASSES[part.rows[i] % 4]}"


def test_another_caption_or_tokenizer_is_other_data(folder):
    def taken(text, size):
        source = captions.read_captioned(write(folder / "x.csv", f"path,caption\na.png,{text}"))
        tokenizer = captions.train_tokenizer(TEXTS, size)
        return take_fingerprint(captions.tokenized(source, tokenizer, 12))

    before = taken("a red square", 270)
    assert describe_changes(before, taken("a red square", 270)) == ""
    for other in (taken("a blue square", 270), taken("a red square", 262)):
        assert describe_changes(before, other) == "1 annotated otherwise ('a.png')"


def test_an_image_instead_of_a_damaged_one_brings_its_own_caption(tmp_path):
    lines = ["path,caption"]
    for i in range(12):
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,number {i}")
    (tmp_path / "3.png").write_bytes(b"no image")
    source = captions.read_captioned(write(tmp_path / "x.csv", "\n".join(lines)))
    source = captions.tokenized(source, captions.train_tokenizer(source.captions, 280), 12)
    sizes = Preprocessing((8, 8), (0.5,) * 3, (0.5,) * 3, 1.0, "bicubic", "center")
    log = DamageLog()
    batches = make_train_iterator(
        source, batch_size=12, preprocessing=sizes,
        crop="none", flip=False, seed=0, num_threads=1, max_damaged=0.5, damage_log=log,
    )  # fmt: skip
    for _ in range(2):
        batch = next(batches)
        np.testing.assert_array_equal(batch["tokens"], source.tokens[batch["index"]])
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], 20 * batch["index"])
    assert log.count == 1


# Tokenizers ---------------------------------------------------------------------------------------


def test_a_trained_tokenizer_knows_every_text_and_is_the_same_again():
    tokenizer = captions.train_tokenizer(TEXTS, 300)
    assert 258 < tokenizer.get_vocab_size() <= 300
    assert captions.train_tokenizer(TEXTS[::-1], 300).to_str() == tokenizer.to_str()
    texts = ["a RED square", "a red square", "日本", ""]
    tokens = captions.tokenize(tokenizer, texts, 10)
    assert (tokens.shape, tokens.dtype) == ((4, 10), np.int32)
    np.testing.assert_array_equal(tokens[0], tokens[1])
    assert tokens[3].tolist() == [1] + [0] * 9  # the end, and padding
    assert tokenizer.decode(tokens[2].tolist()).strip() == "日本"
    again = captions.read_tokenizer(tokenizer.to_str())
    np.testing.assert_array_equal(captions.tokenize(again, texts, 10), tokens)


def test_long_captions_are_cut_before_the_end_and_counted(folder):
    text = "path,caption\na.png,one two three four five six seven\nb.png,two\n"
    source = captions.read_captioned(write(folder / "x.csv", text))
    source = captions.tokenized(source, captions.train_tokenizer(TEXTS, 258), 6)
    assert source.note == "1 of 2 captions are cut at 6 tokens"
    assert source.tokens[0, -1] == 1


def test_a_tokenizer_of_a_file_or_a_folder(tmp_path):
    tokenizer = captions.train_tokenizer(TEXTS, 280)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for spec in (tmp_path, tmp_path / "tokenizer.json"):
        found = captions.load_tokenizer(str(spec))
        np.testing.assert_array_equal(
            captions.tokenize(found, TEXTS, 9), captions.tokenize(tokenizer, TEXTS, 9)
        )


def test_what_pads_is_the_tokenizers_own_word():
    from tokenizers import Tokenizer, models, pre_tokenizers

    def words(*names):
        made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, names[0]))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return made

    assert captions.tokenize(words("?", "x", "</s>"), ["x"], 3).tolist() == [[1, 2, 2]]
    assert captions.tokenize(words("?", "x", "[PAD]", "</s>"), ["x"], 3).tolist() == [[1, 2, 2]]
    own = words("?", "x", "nothing", "</s>")
    own.enable_padding(pad_id=2, pad_token="nothing", direction="left")
    assert captions.tokenize(own, ["x"], 3).tolist() == [[1, 2, 2]]
    with pytest.raises(UserError, match="it has no padding, nor a token of <pad>"):
        captions.tokenize(words("?", "x"), ["x"], 3)


def test_tokenizers_that_are_not_to_be_read(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{}")
    cases = {
        "gone.json": "there is no .*gone.json: give a tokenizer.json",
        "tokenizer.json": "the tokenizers library can't read it",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            captions.load_tokenizer(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"config.text.vocab_size 200: .* at least 258 tokens"):
        captions.train_tokenizer(TEXTS, 200)
    (tmp_path / "spiece.model").write_bytes(b"")
    real = builtins.__import__

    def without(name, *rest, **more):
        if name in missing:
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    missing = ["sentencepiece"]
    with pytest.raises(UserError, match=r"run `pip install 'vision_jax\[text\]'` to read it"):
        captions.load_tokenizer(str(tmp_path / "spiece.model"))
    missing = ["tokenizers"]
    with pytest.raises(UserError, match=r"run `pip install 'vision_jax\[text\]'` to tokenize"):
        captions.train_tokenizer(TEXTS, 300)
