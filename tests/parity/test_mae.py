"""Our MAE against transformers' ViTMAEForPreTraining: loss, reconstruction, gradients, files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from vision_jax import convert
from vision_jax.certify.measure import certify_reference, relative_error
from vision_jax.certify.random_weights import randomize, sample_images
from vision_jax.certify.references import make_reference
from vision_jax.convert.package import write_package
from vision_jax.models.families import build_model
from vision_jax.ops import reconstruction
from vision_jax.ops.position_embedding import grid_positions
from vision_jax.tasks.pretraining import objective
from vision_jax.trees.paths import flatten, unflatten

SMALL = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
    "image_size": 32, "patch_size": 8, "decoder_hidden_size": 48, "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 4, "decoder_intermediate_size": 80,
}  # fmt: skip
BARS = {"float32": 1e-5, "float64": 1e-10}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def reference(**more):
    made = make_reference("transformers", "ViTMAEForPreTraining", {**SMALL, **more})
    randomize(made.module, 3)
    return made


def imported(folder, dtype="float32", **more):
    """(model, parameters by path) of a folder."""
    weights = convert.read_weights(str(folder), family="mae")
    family, arguments = convert.recognize(weights)
    assert family == "mae"
    arguments |= {**IMAGENET, **more}
    model = build_model(family, **arguments, dtype=jnp.dtype(dtype))
    images = jnp.zeros((1, *model.image_size, model.in_channels))
    like = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    return model, like, convert.import_weights(weights, flatten(like), arguments)


def noise_for(seed, images, patches):
    return np.random.default_rng(seed).random((images, patches))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", BARS)
def test_loss_reconstruction_and_gradients(dtype, normalize, tmp_path, request):
    seed = request.config.option.seed
    torch_model = reference(norm_pix_loss=normalize)
    torch_model.save(tmp_path)
    images = sample_images(3, (32, 32), 3, seed)  # [B, H, W, C] in [0, 1]
    noise = noise_for(seed, 3, 16)
    module = torch_model.module.to(getattr(torch, dtype))
    for parameter in module.parameters():
        parameter.requires_grad_()  # the positions too, so that every path is compared
    shift, scale = (np.asarray(IMAGENET[name]) for name in ("mean", "std"))
    pixels = torch.from_numpy(((images - shift) / scale).transpose(0, 3, 1, 2).astype(dtype))
    theirs = module(pixels, noise=torch.from_numpy(noise))
    theirs.loss.backward()

    with jax.enable_x64(dtype == "float64"):
        model, like, flat = imported(tmp_path, dtype)
        flat = {path: jnp.asarray(x, dtype) for path, x in flat.items()}
        task = objective.Task(
            patch_size=8, patches=16, **IMAGENET, mask_ratio=0.75, normalize=normalize
        )
        given = jnp.asarray(images, dtype)
        visible = reconstruction.visible_patches(jnp.asarray(noise, dtype), 0.75)
        hidden = reconstruction.hidden_mask(visible, 16)

        def loss_of(flat):
            params = {"params": unflatten(like, flat)}
            predicted = model.apply(params, given, visible, train=True)["logits"]
            losses = reconstruction.reconstruction_losses(
                predicted, task.targets(given), hidden.astype(dtype)
            )
            return losses.mean(), predicted

        (loss, predicted), gradients = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(flat)
    np.testing.assert_array_equal(hidden, theirs.mask.numpy())
    assert relative_error(np.asarray(predicted), theirs.logits.detach().numpy()) <= BARS[dtype]
    assert abs(float(loss) / theirs.loss.item() - 1) <= BARS[dtype]

    of_torch = {name: x.grad.numpy() for name, x in module.named_parameters()}
    ours, _ = convert.export_weights(
        {path: np.asarray(x) for path, x in gradients.items()},
        "mae",
        convert.arguments_of(model),
        to="transformers",
    )
    memory = {}
    for name, array in ours.items():  # files name what is in memory otherwise
        for old, new in (
            ("vit.encoder.layer.", "vit.layers."),
            ("attention.attention.query", "attention.q_proj"),
            ("attention.attention.key", "attention.k_proj"),
            ("attention.attention.value", "attention.v_proj"),
            ("attention.output.dense", "attention.o_proj"),
            ("intermediate.dense", "mlp.fc1"),
            (".output.dense", ".mlp.fc2"),
        ):
            name = name.replace(old, new)
        memory[name] = array
    assert memory.keys() == of_torch.keys()
    largest = max(np.abs(x).max() for x in of_torch.values())
    for name, gradient in of_torch.items():
        error = np.abs(memory[name] - gradient).max()
        # The key's bias has no gradient but rounding: softmax doesn't see it.
        scale = largest if "k_proj.bias" in name else np.abs(gradient).max()
        assert error <= BARS[dtype] * scale, name


def test_a_folder_goes_in_and_comes_back():
    certificate = certify_reference(reference(), (32, 32), whole=True, as_family="mae")
    assert certificate["pass"], certificate["reasons"]
    assert certificate["family"] == "mae"
    assert certificate["parameters_filled"] == certificate["parameters_in_model"]
    assert certificate["tensors_dropped"] == []
    assert {"embed", "block_1", "encoded", "logits"} <= set(certificate["errors"]["float64"])


def test_all_that_transformers_writes_is_read(tmp_path):
    """Its files have other names than the published ones, and its memory others still."""
    module = reference().module
    flats = []
    module.save_pretrained(tmp_path / "file")
    tensors = load_file(tmp_path / "file/model.safetensors")
    assert any(name.startswith("decoder.decoder_encoder.layer.") for name in tensors)
    published = {
        name.replace("decoder_encoder.layer.", "decoder_layers."): x for name, x in tensors.items()
    }
    config = (tmp_path / "file/config.json").read_text()
    for name, content in (("published", published), ("memory", module.state_dict())):
        (tmp_path / name).mkdir()
        save_file(content, tmp_path / name / "model.safetensors", {"format": "pt"})
        (tmp_path / name / "config.json").write_text(config)
    for name in ("file", "published", "memory"):
        model, _, flat = imported(tmp_path / name)
        flats.append(flat)
        assert (model.decoder_depth, model.decoder_num_heads) == (2, 4)
        encoder = convert.recognize(convert.read_weights(str(tmp_path / name)))
        assert encoder[0] == "vit"
    for flat in flats[1:]:
        assert flat.keys() == flats[0].keys()
        assert all(np.array_equal(flat[path], x) for path, x in flats[0].items())


def test_the_encoder_goes_to_transformers_as_an_ordinary_vit(tmp_path):
    reference().save(tmp_path)
    weights = convert.read_weights(str(tmp_path))
    family, arguments = convert.recognize(weights)
    assert family == "vit"
    model = build_model(family, **arguments)
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *model.image_size, 3)))[
        "params"
    ]
    params = convert.import_weights(weights, flatten(like), arguments)
    write_package(tmp_path / "vit", params, family, convert.arguments_of(model), to="transformers")
    assert json.loads((tmp_path / "vit/config.json").read_text())["model_type"] == "vit"
    loaded, report = transformers.ViTModel.from_pretrained(
        tmp_path / "vit", output_loading_info=True, add_pooling_layer=False
    )
    assert not any(report.values())
    images = sample_images(2, (32, 32), 3, 0).astype(np.float32)
    shift, scale = (np.asarray(arguments[name], np.float32) for name in ("mean", "std"))
    with torch.no_grad():
        pixels = torch.from_numpy(((images - shift) / scale).transpose(0, 3, 1, 2).copy())
        theirs = loaded(pixels).last_hidden_state[:, 0].numpy()
    ours = jax.jit(model.apply)({"params": unflatten(like, params)}, jnp.asarray(images))
    assert relative_error(np.asarray(ours), theirs) <= 1e-5


def test_positions_and_patches_are_transformers_own():
    module = make_reference("transformers", "ViTMAEForPreTraining", SMALL).module
    # A new one has none: findings/transformers_vit_mae_without_positions.sh.
    module.vit.embeddings.patch_embeddings.projection._is_hf_initialized = False
    module.vit.embeddings.initialize_weights()
    module.decoder.initialize_weights(16)
    theirs = module.vit.embeddings.position_embeddings.numpy()
    np.testing.assert_allclose(grid_positions((4, 4), 64, 1), theirs, atol=1e-6)
    theirs = module.decoder.decoder_pos_embed.numpy()
    np.testing.assert_allclose(grid_positions((4, 4), 48, 1), theirs, atol=1e-6)
    images = np.random.default_rng(0).random((2, 32, 32, 3), np.float32)
    patches = module.patchify(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    np.testing.assert_array_equal(reconstruction.patchify(jnp.asarray(images), 8), patches)
    np.testing.assert_array_equal(reconstruction.unpatchify(patches, (4, 4), 8), images)
