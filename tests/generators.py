"""Small generators and autoencoders with random weights, written as their sources write them."""

import functools
import json
import tempfile
from contextlib import contextmanager
from pathlib import Path

import jax
from safetensors.numpy import load_file, save_file

from vision_jax.convert import arguments_of, export_weights, own_naming, write_safetensors
from vision_jax.convert.package import write_package
from vision_jax.data.captions import train_tokenizer
from vision_jax.models.families import build_model, family_of, initialize
from vision_jax.trees import paths

CLASSES = {"0": "tench, Tinca tinca", "1": "goldfish", "2": "great white shark"}
DIT = {"num_classes": 3, "image_size": (4, 4), "patch_size": 2, "width": 16, "depth": 1,
       "num_heads": 2, "mlp_width": 64, "in_channels": 4}  # fmt: skip
DIFFUSERS = {"predicts": "noise", "time_shift": 1, "mlp_norm_eps": 1e-5, "learned_variance": True}
KL = {"widths": (8, 16), "stage_depth": 1, "groups": 4, "latent_channels": 4}
TINY = {"encoder_width": 8, "decoder_width": 8, "encoder_depths": (1, 1), "decoder_depths": (1, 1)}


def randomized(model, size, seed=0, scale=0.2):
    """Its parameters, all random, also those of adaLN-zero."""
    params = initialize(model, jax.random.key(seed), size)["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [scale * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, drawn)


def write(folder, family, arguments, to, seed=0, header=False):
    """A folder as the source writes it, or with our header; (model, parameters)."""
    model = build_model(family, **arguments)
    scale = 0.05 if family == "dit" else 0.2
    params = randomized(model, getattr(model, "image_size", (8, 8)), seed, scale)
    flat = jax.device_get(paths.flatten(params))
    if header:
        tensors, ours = export_weights(flat, family_of(model), arguments_of(model), to=to)
        write_safetensors(folder / "model.safetensors", tensors, ours)
        return model, params
    write_package(folder, flat, family_of(model), arguments_of(model), to=to)
    (file,) = folder.glob("*.safetensors")
    save_file(load_file(file), file)
    return model, params


def write_pipeline(folder):
    """A DiT of diffusers, with the names of its classes in the folder around; its own folder."""
    write(folder / "transformer", "dit", DIT | DIFFUSERS, "diffusers")
    write(folder / "vae", "autoencoder_kl", KL, "diffusers")
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": "DiTPipeline", "id2label": CLASSES})
    )
    return folder / "transformer"


@functools.cache
def autoencoder():
    """The folder of an AutoencoderKL that halves images."""
    folder = Path(tempfile.mkdtemp())
    write(folder, "autoencoder_kl", KL, "diffusers")
    return folder


@contextmanager
def silent(total):
    """Instead of logging.show_progress."""
    del total
    yield (lambda: None), None


def write_tower(folder, seed=0):
    """A SigLIP and the tokenizer of its texts."""
    arguments = {"num_classes": 0, "image_size": (8, 8), "patch_size": 4, "width": 12, "depth": 1,
                 "num_heads": 2, "mlp_width": 16, "vocab_size": 300, "text_length": 8,
                 "text_width": 16, "text_depth": 1, "text_num_heads": 2,
                 "text_mlp_width": 16}  # fmt: skip
    model = build_model("siglip", **arguments)
    flat = jax.device_get(paths.flatten(randomized(model, (8, 8), seed)))
    folder.mkdir(parents=True, exist_ok=True)
    to = own_naming("siglip")
    tensors, header = export_weights(flat, "siglip", arguments_of(model), to=to)
    write_safetensors(folder / "model.safetensors", tensors, header)
    tokenizer = train_tokenizer(["a photo of a bag.", "a photo of a coat."], 300)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    return folder
