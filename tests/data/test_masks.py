import io
import json

import numpy as np
import pytest
from PIL import Image

from vision_jax.data.masks import (
    IGNORED,
    ClassTable,
    decode_mask,
    make_class_table,
    read_class_table,
)
from vision_jax.errors import UserError


def encode(image, kind="png", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def bits_png(values, bits):
    """A grey PNG of 1, 2 or 4 bits, written by hand: Pillow writes none of 2 and 4."""
    import struct
    import zlib

    def chunk(kind, data):
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    height, width = values.shape
    rows = b""
    for row in values:
        padded = np.pad(row, (0, -width % (8 // bits))).reshape(-1, 8 // bits)
        shifts = np.arange(8 // bits)[::-1] * bits
        rows += b"\0" + bytes((padded << shifts).sum(1).astype(np.uint8))
    head = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_of_few_bits_counts_from_0(rng, bits):
    values = rng.integers(2**bits, size=(5, 7)).astype(np.uint8)
    assert decode_mask(bits_png(values, bits), name="m.png").tolist() == values.tolist()


def test_values_are_those_that_were_stored(rng, tmp_path):
    values = rng.integers(256, size=(6, 5)).astype(np.uint8)
    palette = Image.fromarray(values)
    palette.putpalette(bytes(rng.integers(256, size=768).astype(np.uint8)))
    deep = rng.integers(65536, size=(6, 5)).astype(np.uint16)
    for data, expected in (
        (encode(Image.fromarray(values)), values),
        (encode(palette), values),
        (encode(Image.fromarray(values), "bmp"), values),
        (encode(Image.fromarray(values), "tiff"), values),
        (encode(Image.fromarray(np.repeat(values[..., None], 3, 2))), values),
        (encode(Image.fromarray(deep)), deep),
        (encode(Image.fromarray(deep), "tiff"), deep),
    ):
        assert decode_mask(data, name="m.png").tolist() == expected.tolist()
    np.save(tmp_path / "m.npy", deep)
    assert (decode_mask((tmp_path / "m.npy").read_bytes(), name="m.npy") == deep).all()


def test_a_palette_has_colors_too(rng):
    colors = rng.integers(256, size=(4, 3)).astype(np.uint8)
    values = rng.integers(4, size=(6, 5)).astype(np.uint8)
    image = Image.fromarray(values)
    image.putpalette(colors.tobytes())
    assert (decode_mask(encode(image), name="m.png", colors=True) == colors[values]).all()


def test_masks_that_are_none_are_refused(rng):
    colors = Image.fromarray(rng.integers(256, size=(6, 5, 3)).astype(np.uint8))
    glass = colors.copy()
    glass.putalpha(128)
    for data, wanted, words in (
        (encode(colors), False, "mode RGB"),
        (encode(glass), True, "transparent"),
        (encode(colors, "jpeg"), True, "lossy"),
        (encode(Image.fromarray(np.zeros((3, 3), np.uint16))), True, "give numbers"),
    ):
        with pytest.raises(UserError, match=words):
            decode_mask(data, name="m.png", colors=wanted)


def test_a_table_names_each_value(rng):
    table = make_class_table("t", [(7, "road"), (3, None), (9, "car"), (200, "road")])
    assert table.class_names == ("road", "car")
    values = rng.choice([7, 3, 9, 200, 255], size=(8, 9)).astype(np.uint8)
    index = {7: 0, 3: IGNORED, 9: 1, 200: 0, 255: IGNORED}
    expected = [[index[int(value)] for value in row] for row in values]
    assert table.look_up(values, name="m").tolist() == expected
    assert table.look_up(values.astype(np.uint16), name="m").tolist() == expected
    values[2, 3] = 8
    with pytest.raises(UserError, match=r"m\.png: 1 pixels of the value 8, which t does not name"):
        table.look_up(values, name="m.png")


def test_a_table_that_names_255_has_it(rng):
    table = make_class_table("t", [(0, "background"), (255, "nucleus")])
    assert table.look_up(np.array([[0, 255]], np.uint8), name="m").tolist() == [[0, 1]]


def test_reduced_as_transformers_does(rng):
    """Its do_reduce_labels: 0 becomes 255, all less 1, and 254 becomes 255."""
    names = [(value, f"class {value}") for value in range(20)]
    values = rng.choice([*range(21), 255], size=(30, 30)).astype(np.uint8)
    reduced = values.copy()
    reduced[reduced == 0] = 255
    reduced = reduced - np.uint8(1)
    reduced[reduced == 254] = 255
    found = make_class_table("t", names).reduced().look_up(values, name="m")
    assert found.tolist() == reduced.tolist()


def test_colors(rng):
    table = make_class_table("t", [(0x000000, None), (0x804020, "tree"), (0x0000FF, "sky")], True)
    pixels = np.array([[[0, 0, 0], [128, 64, 32]], [[0, 0, 255], [128, 64, 32]]], np.uint8)
    assert table.look_up(pixels, name="m").tolist() == [[IGNORED, 0], [1, 0]]
    pixels[1, 1, 2] += 1
    with pytest.raises(UserError, match=r"1 pixels of the value #804021"):
        table.look_up(pixels, name="m")


@pytest.mark.parametrize(
    ("name", "content", "names", "values", "colors"),
    [
        ("c.json", '["a", "b"]', ("a", "b"), (0, 1), False),
        ("c.json", '{"0": "a", "255": null, "3": "b"}', ("a", "b"), (0, 255, 3), False),
        ("c.json", '{"#0000ff": "a"}', ("a",), (255,), True),
        ("c.csv", "name,value\na,1\n,0\n", ("a",), (1, 0), False),
        ("c.csv", "name, r, g, b\nAnimal, 64, 128, 64\n", ("Animal",), (0x408040,), True),
        ("c.csv", "name;value\na;1\n", ("a",), (1,), False),
    ],
)
def test_tables_of_files(tmp_path, name, content, names, values, colors):
    (tmp_path / name).write_text(content)
    table = read_class_table(tmp_path / name)
    assert (table.class_names, table.values, table.colors) == (names, values, colors)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("c.json", "3", "not a list"),
        ("c.json", "{}", "no class"),
        ("c.json", '{"0": "a", "#000000": "b"}', "numbers and colors"),
        ("c.json", '{"-1": "a"}', "no value"),
        ("c.json", '{"70000": "a"}', "the value 70000"),
        ("c.json", '{"1": "a", "01": "b"}', "two names"),
        ("c.json", '{"0": 5}', "the name 5"),
        ("c.json", '{"road": 1}', "the name behind it"),
        ("c.json", '{"road": [128, 64, 128]}', "the name behind it"),
        ("c.json", json.dumps([f"c{i}" for i in range(256)]), "256 classes"),
        ("c.csv", "a,b\n1,2\n", "begin with"),
        ("c.csv", "name,r,g,b\na,1,2,300\n", "no color"),
    ],
)
def test_other_tables_are_refused(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words) as error:
        read_class_table(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_table_pickles_small():
    import pickle

    table = make_class_table("t", [(0, "a"), (1, "b")])
    assert pickle.loads(pickle.dumps(table)) == table
    assert isinstance(table, ClassTable)
