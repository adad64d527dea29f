"""Our SigLIP against transformers' SiglipModel: features, logits, loss, gradients, files."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from jax.sharding import Mesh
from safetensors.torch import load_file

from vision_jax import convert
from vision_jax.certify.measure import certify_reference, relative_error
from vision_jax.certify.random_weights import randomize, sample_images
from vision_jax.certify.references import make_reference
from vision_jax.convert.package import write_package
from vision_jax.data import captions
from vision_jax.errors import UserError
from vision_jax.models.families import build_model
from vision_jax.tasks.image_text import objective
from vision_jax.trees.paths import flatten, unflatten

IMAGE = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
TEXT = {
    "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 80,
    "vocab_size": 50, "max_position_embeddings": 7, "projection_size": 64,
}  # fmt: skip
BARS = {"float32": 1e-5, "float64": 1e-10}


def reference(**text):
    given = {"vision_config": IMAGE, "text_config": {**TEXT, **text}}
    made = make_reference("transformers", "SiglipModel", given)
    randomize(made.module, 3)
    with torch.no_grad():
        made.module.logit_scale.fill_(1.7)
        made.module.logit_bias.fill_(-2.3)
    return made


def imported(folder, dtype="float32"):
    """(model, shapes of its parameters, parameters by path) of a folder."""
    weights = convert.read_weights(str(folder), family="siglip")
    family, arguments = convert.recognize(weights)
    assert family == "siglip"
    model = build_model(family, **arguments, dtype=jnp.dtype(dtype))
    images = jnp.zeros((1, *model.image_size, model.in_channels))
    like = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    return model, like, convert.import_weights(weights, flatten(like), arguments)


def draws(seed, count, dtype):
    images = sample_images(count, (32, 32), 3, seed)  # [B, H, W, C] in [0, 1]
    tokens = np.random.default_rng(seed).integers(0, TEXT["vocab_size"], (count, 7))
    pixels = torch.from_numpy((2 * images - 1).transpose(0, 3, 1, 2).astype(dtype))
    return images, tokens, pixels


def written(model, arrays):
    tensors, _ = convert.export_weights(
        {path: np.asarray(x) for path, x in arrays.items()},
        "siglip",
        convert.arguments_of(model),
        to="transformers",
    )
    return tensors


@pytest.mark.parametrize("devices", [1, 5])
@pytest.mark.parametrize("dtype", BARS)
def test_features_logits_loss_and_gradients(dtype, devices, tmp_path, request):
    """The loss is that of the task, whose texts go around the devices."""
    mesh = Mesh(np.array(jax.devices()[:devices]).reshape(devices, 1), ("data", "fsdp"))
    goal = objective.make_objective(None, None, mesh)
    torch_model = reference()
    torch_model.save(tmp_path)
    images, tokens, pixels = draws(request.config.option.seed, 5, dtype)
    module = torch_model.module.to(getattr(torch, dtype))
    theirs = module(input_ids=torch.from_numpy(tokens), pixel_values=pixels, return_loss=True)
    theirs.loss.backward()

    with jax.enable_x64(dtype == "float64"):
        model, like, flat = imported(tmp_path, dtype)
        flat = {path: jnp.asarray(x, dtype) for path, x in flat.items()}
        given, texts = jnp.asarray(images, dtype), jnp.asarray(tokens, jnp.int32)

        def loss_of(flat):
            params = {"params": unflatten(like, flat)}
            outputs, features = model.apply(params, given, texts, train=True, return_features=True)
            losses, _ = goal.criterion({}, outputs, {})
            cosine = outputs["image"] @ outputs["text"].T
            logits = jnp.exp(outputs["logit_scale"]) * cosine + outputs["logit_bias"]
            return losses.mean(), {**outputs, **features, "logits": logits}

        (loss, found), gradients = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(flat)
    assert abs(float(loss) / theirs.loss.item() - 1) <= BARS[dtype]
    for name, wanted in (
        ("pooled", theirs.vision_model_output.pooler_output),
        ("text_pooled", theirs.text_model_output.pooler_output),
        ("image", theirs.image_embeds),
        ("text", theirs.text_embeds),
        ("logits", theirs.logits_per_image),
    ):
        assert relative_error(np.asarray(found[name]), wanted.detach().numpy()) <= BARS[dtype], name

    of_torch = {name: x.grad.numpy() for name, x in module.named_parameters()}
    ours = written(model, gradients)
    assert ours.keys() == of_torch.keys()
    largest = max(np.abs(x).max() for x in of_torch.values())
    for name, gradient in of_torch.items():
        # The key's bias has no gradient but rounding: softmax doesn't see it.
        scale = largest if "k_proj.bias" in name else np.abs(gradient).max()
        assert np.abs(ours[name] - gradient).max() <= BARS[dtype] * scale, name


def test_a_folder_goes_in_and_comes_back(tmp_path):
    torch_model = reference(hidden_act="gelu", layer_norm_eps=1e-4)
    torch_model.save(tmp_path / "in")
    model, _, flat = imported(tmp_path / "in")
    assert (model.text_activation, model.text_layer_norm_eps) == ("gelu", 1e-4)
    assert (model.text_num_heads, model.text_depth, model.text_length) == (3, 3, 7)
    tensors = load_file(tmp_path / "in/model.safetensors")
    back = written(model, flat)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor.numpy(), err_msg=name)
    write_package(tmp_path / "out", flat, "siglip", convert.arguments_of(model), to="transformers")
    again, report = transformers.SiglipModel.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values())
    again.load_state_dict(load_file(tmp_path / "out/model.safetensors"), strict=True)
    _, tokens, pixels = draws(1, 2, "float32")
    with torch.no_grad():
        given = {"input_ids": torch.from_numpy(tokens), "pixel_values": pixels}
        first, second = (m(**given).logits_per_image for m in (torch_model.module, again))
    np.testing.assert_array_equal(first.numpy(), second.numpy())


def test_without_being_asked_for_it_is_an_image_tower(tmp_path):
    reference().save(tmp_path)
    family, arguments = convert.recognize(convert.read_weights(str(tmp_path)))
    assert (family, arguments["pool"]) == ("vit", "map")


def test_a_config_that_the_tensors_contradict_is_refused(tmp_path):
    reference().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name, value, message in (
        ("vocab_size", 51, "text_config.vocab_size 51, and the tensors are of 50"),
        ("num_attention_heads", 5, "how many heads share the text tower's 48 channels"),
        ("hidden_act", "mish", "text_config.hidden_act 'mish' is none of"),
    ):
        text = {**config["text_config"], name: value}
        (tmp_path / "config.json").write_text(json.dumps({**config, "text_config": text}))
        with pytest.raises(UserError, match=message):
            convert.recognize(convert.read_weights(str(tmp_path), family="siglip"))


@pytest.mark.long
def test_both_towers_are_certified():
    measured = certify_reference(reference(), (32, 32), as_family="siglip")
    assert measured["pass"], measured["reasons"]
    assert {"pooled", "text_pooled", "logits"} <= set(measured["errors"]["float64"])
    assert measured["parameters_filled"] == measured["parameters_in_model"]


def test_a_sentencepiece_tokenizer_is_transformers_own(tmp_path, rng):
    """A folder as published: spiece.model and tokenizer_config.json; texts of 64 tokens."""
    sentencepiece = pytest.importorskip("sentencepiece")
    words = ["a", "photo", "of", "the", "cat", "dog", "grünes", "T-shirt", "don't", "naïve", "日本"]
    lines = [" ".join(rng.choice(words, rng.integers(1, 9))) for _ in range(200)]
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=file, vocab_size=200, hard_vocab_limit=False,
        unk_id=2, eos_id=1, bos_id=-1, pad_id=0, minloglevel=2, num_threads=1,
    )  # fmt: skip
    (tmp_path / "spiece.model").write_bytes(file.getvalue())
    theirs = transformers.SiglipTokenizer(str(tmp_path / "spiece.model"))
    theirs.save_pretrained(tmp_path)
    ours = captions.load_tokenizer(str(tmp_path))
    said = [*lines, "An ODD  one, (with) everything: 1-2!", "", "?!", " ".join(lines[:40])]
    given = {"padding": "max_length", "truncation": True, "max_length": 64}
    np.testing.assert_array_equal(
        captions.tokenize(ours, said, 64), np.array(theirs(said, **given)["input_ids"])
    )
