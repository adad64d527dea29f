"""The converter's command line: what it writes, what it refuses, and what it leaves behind."""

import hashlib
import io
import json
import pickle
import re
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import runs
import safetensors.numpy
from safetensors.numpy import load_file

from vision_jax import convert
from vision_jax.commands.convert import main
from vision_jax.convert import files
from vision_jax.errors import UserError
from vision_jax.models.families import FAMILIES, build_model
from vision_jax.trees import paths

GOLDEN = Path(__file__).parents[1] / "golden"
VIT = {
    "width": 32,
    "depth": 2,
    "num_heads": 2,
    "mlp_width": 64,
    "patch_size": 8,
    "image_size": (16, 16),
    "num_classes": 3,
}


def random_model(rng, **changed):
    """(arguments, params by path) of a small ViT."""
    arguments = {**FAMILIES["vit"].defaults, **VIT, **changed}
    model = build_model("vit", **arguments)
    images = (1, *arguments["image_size"], 3)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(images)))["params"]
    return arguments, {
        path: rng.standard_normal(leaf.shape, np.float32)
        for path, leaf in paths.flatten(shapes).items()
    }


@pytest.fixture
def source(tmp_path, rng):
    """A good file of timm's naming."""
    arguments, params = random_model(rng)
    tensors, header = convert.export_weights(params, "vit", arguments)
    convert.write_safetensors(tmp_path / "x.safetensors", tensors, header)
    return tmp_path / "x.safetensors"


def succeeds(capsys, *arguments):
    code = main(list(map(str, arguments)))
    screen = capsys.readouterr()
    assert (code, screen.err) == (0, "")
    return screen.out.splitlines()


def fails(capsys, out, *arguments):
    """The one line on stderr; and nothing new lies about."""
    before = set(out.parent.rglob("*"))
    assert main([*map(str, arguments), f"--out={out}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert set(out.parent.rglob("*")) == before
    return error


def test_it_says_what_it_found_and_names_each_file(source, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    first, *rest, note = succeeds(capsys, source, f"--out={out}", "--to=transformers")
    assert first.startswith(f"{source}: timm vit")
    assert note.startswith("note: transformers rounds the center of a crop otherwise")
    for words in ("width=32", "depth=2", "32 tensors consumed", "32 parameters filled"):
        assert words in first
    assert {line.split()[1] for line in rest} == {str(path) for path in out.iterdir()}
    assert (out / "config.json").stat().st_mode & 0o777 == 0o644
    assert (out.stat().st_mode & 0o700) == 0o700


def test_there_and_back_is_bit_identical(source, tmp_path, capsys):
    succeeds(capsys, source, f"--out={tmp_path / 'a'}", "--to=transformers")
    succeeds(capsys, tmp_path / "a", f"--out={tmp_path / 'b'}")
    original, again = load_file(source), load_file(tmp_path / "b" / "model.safetensors")
    assert set(original) == set(again)
    for name, array in original.items():
        np.testing.assert_array_equal(array, again[name])


def test_the_same_command_writes_the_same_bytes(source, tmp_path, capsys):
    for out in ("a", "b"):
        succeeds(capsys, source, f"--out={tmp_path / out}", "--to=transformers")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_shards_hold_what_one_file_would(source, tmp_path, capsys):
    succeeds(capsys, source, f"--out={tmp_path / 'one'}", "--to=transformers")
    shards = ("--to=transformers", "--shard-gb=0.00002")
    lines = succeeds(capsys, source, f"--out={tmp_path / 'many'}", *shards)
    whole = load_file(tmp_path / "one" / "model.safetensors")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(whole)
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in whole.values())
    names = sorted(set(index["weight_map"].values()))
    assert len(names) > 2
    assert sum(".safetensors (" in line for line in lines) == len(names)
    joined = convert.read_weights(str(tmp_path / "many"))
    for name, array in whole.items():
        np.testing.assert_array_equal(joined.tensors[name], array)
    assert "one file" in fails(capsys, tmp_path / "timm", source, "--shard-gb=0.00002")


def test_a_dry_run_checks_and_writes_nothing(source, tmp_path, capsys):
    before = set(tmp_path.rglob("*"))
    lines = succeeds(capsys, source, "--dry-run", "--to=transformers")
    assert "nothing" in lines[-1]
    assert set(tmp_path.rglob("*")) == before
    assert main([str(source), "--dry-run", "--to=flax"]) == 2


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ([], "--out"),
        (["--out=o", "--shard-gb=-1"], "shard"),
        (["--out=o", "--fast"], "--fast"),
        (["--out=o", "--checkpoint=best"], "run"),
    ],
)
def test_bad_flags_are_one_line(flags, word, source, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([str(source), *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert word in error


def test_help_shows_commands():
    program = [sys.executable, "-m", "vision_jax.convert", "--help"]
    done = subprocess.run(program, cwd=runs.ROOT, capture_output=True, text=True, check=True)
    assert "hf://microsoft/resnet-50" in done.stdout
    assert "--allow-pickle" in done.stdout


def test_what_is_there_is_not_overwritten(source, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    succeeds(capsys, source, f"--out={out}")  # an empty folder may be there
    error = fails(capsys, out, source)
    assert "is there already" in error
    assert "is there already" in fails(capsys, source, source)


# A run of ours -----------------------------------------------------------------------------------


def test_a_finished_run_goes_out_merged(tmp_path, capsys):
    workdir = runs.finished()
    capsys.readouterr()
    line = succeeds(capsys, workdir, f"--out={tmp_path / 'a'}")[0]
    assert "vit" in line
    merged = load_file(workdir / "model.safetensors")
    written = load_file(tmp_path / "a" / "model.safetensors")
    assert set(merged) == set(written)
    for name, array in merged.items():
        np.testing.assert_array_equal(array, written[name])
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["label_names"] == list(runs.CLASSES)


def test_a_checkpoint_of_a_run_is_merged_and_averaged(tmp_path, capsys):
    workdir = runs.finished()
    capsys.readouterr()
    line = succeeds(capsys, workdir, f"--out={tmp_path / 'a'}", "--checkpoint=last")[0]
    assert f"step {runs.STEPS}" in line
    merged = load_file(workdir / "model.safetensors")
    written = load_file(tmp_path / "a" / "model.safetensors")
    assert set(merged) == set(written)
    for name, array in merged.items():
        np.testing.assert_allclose(array, written[name], rtol=1e-6, atol=1e-6)


# Files that are broken, foreign or hostile -------------------------------------------------------


class Payload:
    """Would leave a file if it were unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("owned"),))


def half_matching(tensors):
    tensors["blocks.0.mlp.fc1.weight"] = np.zeros((5, 32), np.float32)
    del tensors["blocks.1.norm2.bias"]
    tensors["blocks.0.adapter.weight"] = np.zeros(2, np.float32)


def test_a_half_matching_file_lists_the_first_differences(source, tmp_path, capsys):
    tensors = load_file(source)
    half_matching(tensors)
    with safetensors.safe_open(source, "numpy") as file:
        convert.write_safetensors(source, tensors, file.metadata())
    error = fails(capsys, tmp_path / "out", source)
    for words in ("blocks.0.mlp.fc1.weight (5, 32)", "block_1/norm2/bias", "adapter"):
        assert words in error


def test_a_foreign_file_names_candidates(tmp_path, capsys):
    convert.write_safetensors(tmp_path / "x.safetensors", {"lstm.weight": np.zeros((3, 3))})
    error = fails(capsys, tmp_path / "out", tmp_path / "x.safetensors")
    assert "candidates" in error
    assert "lstm.weight" in error


def headers():
    """Headers that claim what is not so."""
    good = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    yield "huge", {"a": good | {"shape": [2**40], "data_offsets": [0, 2**42]}}, 8
    yield "overflowing", {"a": good | {"shape": [2**40, 2**40]}}, 8
    yield "negative", {"a": good | {"shape": [-2]}}, 8
    yield "outside", {"a": good | {"data_offsets": [8, 16]}}, 8
    yield "overlapping", {"a": good, "b": good}, 8
    yield "with a hole", {"a": good}, 16
    yield "of no dtype", {"a": good | {"dtype": "OBJECT"}}, 8


@pytest.mark.parametrize("case", list(headers()), ids=lambda case: case[0])
def test_headers_that_lie(case, tmp_path, capsys):
    _, header, count = case
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(count))
    assert "damaged" in fails(capsys, tmp_path / "out", path)


@pytest.mark.parametrize("length", [2**63 - 1, 2**40, 0, 3])
def test_a_header_that_claims_its_own_length(length, tmp_path, capsys):
    path = tmp_path / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}" + bytes(8))
    assert "damaged" in fails(capsys, tmp_path / "out", path)


@pytest.mark.parametrize("keep", [0, 7, 100, 5000, -1])
def test_truncated_files(keep, source, tmp_path, capsys):
    source.write_bytes(source.read_bytes()[:keep])
    assert "damaged" in fails(capsys, tmp_path / "out", source)


@pytest.mark.parametrize("name", ["x.safetensors", "x.npz"])
def test_a_pickle_by_another_name_is_not_run(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(pickle.dumps(Payload()))
    assert "damaged" in fails(capsys, tmp_path / "out", tmp_path / name, "--allow-pickle")
    assert not (tmp_path / "owned").exists()


def npy(shape, spaces=100):
    """The bytes of an array of zeros, with spaces in its header."""
    head = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    head += b" " * spaces + b"\n"
    data = bytes(4 * int(np.prod(shape)))
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + data


def zipped(*members):
    buffer = io.BytesIO()
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(buffer, "w") as file:
        for name, data in members:
            file.writestr(name, data)
    return buffer.getvalue()


def hostile_archives():
    buffer = io.BytesIO()
    np.savez(buffer, a=np.array([Payload()], object))
    yield "objects", buffer.getvalue()
    plain = io.BytesIO()
    np.savez(plain, a=np.zeros(3))
    yield "truncated", plain.getvalue()[:100]
    huge = io.BytesIO()
    with zipfile.ZipFile(huge, "w") as archive:
        head = b"{'descr': '<f4', 'fortran_order': False, 'shape': (%d,), }" % 2**50
        head += b" " * (117 - len(head)) + b"\n"
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head)
    yield "huge", huge.getvalue()
    text = io.BytesIO()
    np.savez(text, a=np.array(["not", "numbers"]))
    yield "text", text.getvalue()
    lone = io.BytesIO()
    np.save(lone, np.zeros(3))
    yield "lone array", lone.getvalue()
    yield "twice", zipped(("a.npy", npy((3,))), ("a.npy", npy((3,))))
    yield "more than there is", zipped(("a.npy", npy((3,))[:-4]))
    yield "less than there is", zipped(("a.npy", npy((3,)) + bytes(4)))
    yield "not .npy", zipped(("a.txt", b"hello"))
    yield "long header", zipped(("a.npy", npy((3,), spaces=60000)))


@pytest.mark.parametrize("case", list(hostile_archives()), ids=lambda case: case[0])
def test_archives_that_are_hostile(case, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.npz").write_bytes(case[1])
    assert "x.npz" in fails(capsys, tmp_path / "out", tmp_path / "x.npz")
    assert not (tmp_path / "owned").exists()


def test_what_is_no_model_is_told_by_its_headers_alone(tmp_path, capsys, monkeypatch):
    """However large an archive would become, none of it is unpacked."""
    np.savez_compressed(tmp_path / "x.npz", lstm=np.zeros((1000, 1000), np.float32))
    monkeypatch.setattr(np, "load", lambda *given, **more: pytest.fail("it was read"))
    assert "lstm" in fails(capsys, tmp_path / "out", tmp_path / "x.npz")


def test_names_out_of_a_file_stay_on_the_line(tmp_path, capsys):
    tensors = {"a\nerror: b": np.zeros(2), "\x1b[31m": np.zeros(2), "c" * 10**5: np.zeros(2)}
    convert.write_safetensors(tmp_path / "x.safetensors", tensors)
    error = fails(capsys, tmp_path / "out", tmp_path / "x.safetensors")
    assert "a\\nerror" in error
    assert error.strip().isprintable()
    assert len(error) < 3000


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"class_names": ["a", "b"]}, "names 2 classes, and its head has 3"),
        ({"preprocessing": {"std": [0, 1, 1]}}, "std"),
        ({"preprocessing": {"mean": [float("inf"), 0, 0]}}, "mean"),
        ({"preprocessing": {"image_size": [-5, 16]}}, "image_size"),
        ({"preprocessing": {"crop_pct": 0}}, "crop_pct"),
        ({"preprocessing": {"crop_mode": "outside"}}, "crop_mode"),
        ({"preprocessing": {"interpolation": ["bicubic"]}}, "preprocessing"),
    ],
    ids=str,
)
def test_what_comes_with_the_weights_has_to_make_sense(header, words, source, tmp_path, capsys):
    with safetensors.safe_open(source, "numpy") as file:
        ours = json.loads(file.metadata()["vision_jax"]) | header
    convert.write_safetensors(source, load_file(source), {"vision_jax": json.dumps(ours)})
    assert words in fails(capsys, tmp_path / "out", source)


def test_a_folder_whose_index_leads_outside(source, tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    weight_map = {"cls_token": "../x.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "../x.safetensors" in fails(capsys, tmp_path / "out", folder)


@pytest.mark.parametrize(
    "arguments",
    [
        {"depth": 10**12},
        {"depth": "many"},
        {"num_heads": 7},
        {"image_size": [0, 0]},
        {"width": -1},
        {"patch_size": None},
        {"colour": 1},
    ],
    ids=str,
)
def test_a_header_whose_arguments_make_no_model(arguments, source, tmp_path, capsys):
    with safetensors.safe_open(source, "numpy") as file:
        ours = json.loads(file.metadata()["vision_jax"])
    ours["arguments"] |= arguments
    convert.write_safetensors(source, load_file(source), {"vision_jax": json.dumps(ours)})
    assert str(source) in fails(capsys, tmp_path / "out", source)


@pytest.mark.parametrize(
    "config",
    [
        {"image_size": "large"},
        {"hidden_size": [], "num_attention_heads": {}},
        {"pretrained_cfg": {"crop_pct": "most"}},
        {"pretrained_cfg": {"input_size": [[]]}},
    ],
    ids=str,
)
def test_configs_that_make_no_sense(config, tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (GOLDEN / "transformers_clip").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    content = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(content))
    assert str(folder) in fails(capsys, tmp_path / "out", folder)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), UserError("no place")])
def test_what_fails_in_the_middle_leaves_nothing(error, source, tmp_path, capsys, monkeypatch):
    written = []

    def fsync(number):
        written.append(number)
        raise error

    monkeypatch.setattr(files.os, "fsync", fsync)
    fails(capsys, tmp_path / "out", source)
    assert written


STOPPED = """
import os, runpy, signal, sys
from vision_jax.convert import files
files.os.fsync = lambda file: os.kill(os.getpid(), signal.SIGTERM)
runpy.run_module("vision_jax.convert", run_name="__main__")
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="signals of POSIX")
def test_who_is_stopped_tidies_up(source, tmp_path):
    before = set(tmp_path.rglob("*"))
    command = [sys.executable, "-c", STOPPED, str(source), f"--out={tmp_path / 'out'}"]
    done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (128 + 15, b"stopped; nothing was written\n")
    assert set(tmp_path.rglob("*")) == before


def test_a_link_to_an_empty_folder_stays(source, tmp_path, capsys):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    succeeds(capsys, source, f"--out={tmp_path / 'link'}")
    assert (tmp_path / "link").is_symlink()
    assert {path.name for path in (tmp_path / "real").iterdir()} == {
        "config.json",
        "model.safetensors",
    }


# Lazy tensors and streams ------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "module.model.", "_orig_mod.module."])
def test_prefixes_come_off_when_all_have_them(prefix, source, tmp_path, capsys):
    tensors = load_file(source)
    wrapped = {f"{prefix}{name}": array for name, array in tensors.items()}
    convert.write_safetensors(source, wrapped)
    assert set(convert.read_weights(str(source)).tensors) == set(tensors)
    convert.write_safetensors(source, {**wrapped, "other": np.zeros(1)})
    kept = {name.replace("_orig_mod.", "") for name in wrapped}  # a compiler's word comes off alone
    assert set(convert.read_weights(str(source)).tensors) == {*kept, "other"}
    dropped = convert.read_weights(str(source), dropped=["other"])
    assert set(dropped.tensors) == set(tensors)


def test_a_losss_tensors_beside_the_model_are_named_and_dropped(source, capsys):
    """What Lightning writes: the model under `model.`, the loss beside it."""
    wrapped = {f"model.{name}": array for name, array in load_file(source).items()}
    beside = {"criterion.pos_weight": np.ones(4, np.float32)}
    header = {"vision_jax": golden_header(source)}
    convert.write_safetensors(source, {**wrapped, **beside}, header)
    assert main([str(source), "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "timm vit" in said
    assert "criterion.pos_weight" in said
    rule = re.search(r"for example (\S+)", said)[1]
    assert main([str(source), "--dry-run", f"--drop={rule}"]) == 0
    assert main([str(source), "--dry-run", "--drop=nothing_such"]) == 2
    assert "--drop: rule 'nothing_such' matches no" in capsys.readouterr().err
    assert main([str(source), "--dry-run", "--drop=("]) == 2
    assert "--drop: '(' is not a regular expression" in capsys.readouterr().err


@pytest.mark.parametrize(
    "word", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]
)
def test_words_of_wrapped_submodules_come_off_inside_of_names(word, source):
    tensors = load_file(source)
    wrapped = {name.replace("blocks.0.", f"blocks.0.{word}."): x for name, x in tensors.items()}
    convert.write_safetensors(source, {f"module.{name}": x for name, x in wrapped.items()})
    assert set(convert.read_weights(str(source)).tensors) == set(tensors)


def test_a_header_that_asks_for_too_much_is_one_line(source, capsys):
    def ask(**arguments):
        header, data = read_header(source)
        own = json.loads(header["__metadata__"]["vision_jax"])
        own["arguments"] |= arguments
        header["__metadata__"]["vision_jax"] = json.dumps(own)
        odd = source.with_name("odd.safetensors")
        write_header(odd, header, data)
        assert main([str(odd), "--dry-run"]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert next(iter(arguments)) in said

    header, data = read_header(source)
    header["cls_token"]["shape"] += [1] * 70
    write_header(source.with_name("axes.safetensors"), header, data)
    assert main([str(source.with_name("axes.safetensors")), "--dry-run"]) == 2
    assert "cls_token has 73 axes" in capsys.readouterr().err
    convert.write_safetensors(source, load_file(source), {"vision_jax": golden_header(source)})
    for arguments in (
        {"in_channels": 10**9},
        {"depth": 10**9},
        {"width": -1},
        {"image_size": [10**6, 10**6]},
        {"image_size": [32]},
        {"layer_norm_eps": float("nan")},
        {"num_heads": "12"},
        {"pool": "sum"},
        {"qkv_bias": 1},
        {"no_such": 1},
    ):
        ask(**arguments)


def read_header(path):
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:start]), raw[start:]


def write_header(path, header, data):
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def golden_header(source):
    """Our header, for a file that has none."""
    family, arguments = convert.recognize(convert.read_weights(str(source)))
    return json.dumps({"family": family, "arguments": arguments})


def test_our_writer_writes_what_the_formats_library_writes(tmp_path, rng):
    tensors = {
        f"{name}{code}": rng.normal(0, 3, (2, 3)).astype(dtype)
        for code, dtype in files.DTYPES.items()
        for name in ("b", "a", "é")
    }
    tensors |= {"scalar": np.full((), 7, np.int64), "empty": np.zeros((0, 4), np.float32)}
    tensors["transposed"] = rng.normal(size=(3, 5)).T
    convert.write_safetensors(tmp_path / "x.safetensors", tensors)
    contiguous = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    theirs = safetensors.numpy.save(contiguous)
    ours = (tmp_path / "x.safetensors").read_bytes()
    start, their_start = (8 + int.from_bytes(data[:8], "little") for data in (ours, theirs))
    assert ours[start:] == theirs[their_start:]
    header, their_header = json.loads(ours[8:start]), json.loads(theirs[8:their_start])
    assert header.pop("__metadata__") == {}
    assert header == their_header
    assert start % 8 == 0
    read, _ = files.open_safetensors(tmp_path / "x.safetensors")
    for name, array in tensors.items():
        np.testing.assert_array_equal(read.entries[name].read(), array)


def test_an_array_may_be_changed_and_the_file_is_not(source):
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    tensors = convert.read_weights(str(source)).tensors
    array, again = tensors["cls_token"], tensors["cls_token"]
    array[...] = 3
    del again  # must not give back the pages of `array`
    assert (array == 3).all()
    assert hashlib.sha256(source.read_bytes()).hexdigest() == digest
    fresh = convert.read_weights(str(source)).tensors
    np.testing.assert_array_equal(fresh["cls_token"], load_file(source)["cls_token"])


def test_tensors_outlive_their_file_and_its_mapping(source):
    expected = load_file(source)["pos_embed"]
    array = convert.read_weights(str(source)).tensors["pos_embed"]
    source.unlink()
    np.testing.assert_array_equal(array, expected)


PROGRAM = """
import sys
from vision_jax.commands.convert import main
code = main(sys.argv[1:])
status = open("/proc/self/status").read()
print("PEAK", int(status.split("VmHWM:")[1].split()[0]) * 1024)
sys.exit(code)
"""


def peak_of(*arguments):
    """Most bytes that a converting process held."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        cwd=runs.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("PEAK")[1])


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_shards_convert_in_bounded_memory(dtype, tmp_path, rng):
    """A model of 0.5 GB in the layout that is joined on import, and split again on export."""
    small = {"width": 64, "mlp_width": 128, "layer_norm_eps": 1e-12}
    large = {"width": 1536, "mlp_width": 6144, "depth": 5, "layer_norm_eps": 1e-12}
    peaks, sizes = [], []
    for number, changed in enumerate((small, large)):
        arguments, params = random_model(rng, **changed)
        tensors, header = convert.export_weights(params, "vit", arguments, to="transformers")
        folder = tmp_path / str(number)
        folder.mkdir()
        lazy = files.Tensors({name: files.held(x.astype(dtype)) for name, x in tensors.items()})
        files.write_shards(folder, lazy, header, 100 * 10**6)
        sizes.append(sum(path.stat().st_size for path in folder.glob("*.safetensors")))
        del params, tensors, lazy
        out = tmp_path / f"out{number}"
        peaks.append(peak_of(folder, f"--out={out}", "--to=transformers", "--shard-gb=0.1"))
    largest = 4 * 6 * 1536 * 6144  # bytes of float32: a tensor, and its rearrangements
    assert peaks[1] - peaks[0] < largest, (peaks, sizes)
    assert sizes[1] > 1.2 * largest
