"""PyTorch references: the same architecture in the library that it comes from."""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pydoc import locate
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import timm
import torch
import torchvision
import transformers
from safetensors.torch import load_file
from timm.models import save_for_hf

from vision_jax.certify import (
    reference_deeplab,
    reference_dense,
    reference_diffusers,
    reference_eomt,
    reference_faster_rcnn,
)
from vision_jax.certify.reference_detr import DETR
from vision_jax.certify.reference_dit import DiT
from vision_jax.certify.reference_nanodet import NanoDet
from vision_jax.certify.texts import sample_tokens
from vision_jax.convert.detectors import DENSE, is_detector
from vision_jax.convert.engine import Rule
from vision_jax.convert.load import recognize, write_safetensors
from vision_jax.convert.package import NPZ_FILE, read_config, write_package
from vision_jax.convert.read import CONFIG_FILE, read_weights
from vision_jax.convert.table import Entry, Table
from vision_jax.convert.tables import find_table, infer_arguments
from vision_jax.errors import UserError
from vision_jax.models.families import FAMILIES

GENERATORS = ("diffusers", "dit")  # sources of models that make images

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


@dataclass
class Reference:
    """A PyTorch model.

    Attributes:
      source: "timm", "torchvision", "transformers", "npz", "detr", "yolox", "nanodet", "dit",
        "fid" or "diffusers".
      module: the model, in evaluation mode.
      build: what the source calls it.
      arguments: what it was built with.
    """

    source: str
    module: torch.nn.Module
    build: str
    arguments: dict[str, Any]

    def save(self, folder: Path) -> str:
        """Writes its file as the library itself does; returns what `read_weights` takes."""
        if self.source == "timm":
            given = {k: v for k, v in self.arguments.items() if k != "num_classes"}
            save_for_hf(
                self.module, folder, model_config={"model_args": given}, safe_serialization=True
            )
        elif self.source == "transformers":
            self.module.save_pretrained(folder)
            if isinstance(self.module, transformers.ViTMAEForPreTraining):
                _rename(folder / "model.safetensors", "decoder_encoder.layer.", "decoder_layers.")
        elif self.source == "diffusers":
            self.module.save_pretrained(folder)
        elif self.source == "npz":
            return str(_save_npz(self.module, folder))
        else:
            tensors = {k: v.numpy() for k, v in self.module.state_dict().items()}
            write_safetensors(folder / "model.safetensors", tensors)
            if self.source in ("detr", "yolox", "nanodet", "dit"):  # what they say is in no tensor
                (folder / CONFIG_FILE).write_text(json.dumps(self.arguments))
            if is_detector(self.build):  # nor is the number of proposals
                config = {"library": "torchvision", "model": self.build, "kwargs": self.arguments}
                (folder / CONFIG_FILE).write_text(json.dumps(config))
            return str(folder / "model.safetensors")
        return str(folder)

    def outputs(
        self,
        images: np.ndarray,
        modules: Mapping[str, str] = {},
        pixel_mask: np.ndarray | None = None,
        **keywords: Any,
    ) -> dict[str, np.ndarray]:
        """The logits, a detector's boxes, and named intermediates for normalized f[B, H, W, C].

        Args:
          images: normalized, in the precision to compute in.
          modules: {name: module whose output it is}.
          pixel_mask: bool[B, H, W], for detectors of padded batches.
          keywords: for the model's forward.
        """
        seen: dict[str, np.ndarray] = {}
        if isinstance(self.module, transformers.UperNetForSemanticSegmentation):
            modules = {**modules, "logits": "decode_head"}  # before they are enlarged
            if self.module.auxiliary_head is not None:
                modules["auxiliary_logits"] = "auxiliary_head"

        def keep(name: str) -> Callable[..., None]:
            def hook(module: Any, inputs: Any, output: Any) -> None:
                seen[name] = tensor_of(output).numpy().copy()

            return hook

        hooks = [
            self.module.get_submodule(path).register_forward_hook(keep(name))
            for name, path in modules.items()
        ]
        module = self.module.to(getattr(torch, str(images.dtype)))
        if isinstance(module, transformers.ViTMAEPreTrainedModel):
            # It shuffles the patches by the order of the noise: sorted noise leaves them alone.
            encoder: Any = getattr(module, "vit", module)
            patches = encoder.embeddings.patch_embeddings.num_patches
            keywords["noise"] = torch.linspace(0, 1, patches).expand(len(images), -1)
        if pixel_mask is not None:
            keywords["pixel_mask"] = torch.from_numpy(pixel_mask)
        pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        given: tuple[Any, ...] = (pixels,)
        if isinstance(module, transformers.SiglipModel):
            text: Any = module.config.text_config
            length, vocab_size = text.max_position_embeddings, text.vocab_size
            tokens = sample_tokens(len(images), length, vocab_size)
            given = (torch.from_numpy(tokens), pixels)
        with torch.no_grad():
            if self.source in GENERATORS:
                output = reference_diffusers.outputs(module, pixels)
            else:
                output = module(*given, **keywords)
        for hook in hooks:
            hook.remove()
        if hasattr(output, "logits_per_image"):
            seen["logits"] = output.logits_per_image.numpy()
        elif hasattr(output, "pred_boxes"):
            seen["logits"] = output.logits.numpy()
            seen["boxes_cxcywh_01"] = output.pred_boxes.numpy()
            if hasattr(output, "enc_outputs_class"):
                seen["encoder_logits"] = output.enc_outputs_class.numpy()
                seen["encoder_boxes_cxcywh_01"] = output.enc_outputs_coord_logits.numpy()
        elif hasattr(output, "masks_queries_logits"):
            seen["logits"] = output.class_queries_logits.numpy()
            seen["mask_logits"] = output.masks_queries_logits.numpy()
        elif isinstance(output, SimpleNamespace):
            seen |= {name: value.numpy() for name, value in vars(output).items()}
        elif "logits" not in seen:
            seen["logits"] = result_of(output, self.module).numpy()
        self.module.float()
        return seen


def _rename(path: Path, old: str, new: str) -> None:
    """Names in a file as the published files have them, where the library writes others."""
    tensors = {name.replace(old, new): tensor.numpy() for name, tensor in load_file(path).items()}
    write_safetensors(path, tensors, {"format": "pt"})


def tensor_of(output: Any) -> torch.Tensor:
    """The tensor of a module's output, whatever it is wrapped in."""
    while not isinstance(output, torch.Tensor):
        output = output[0]
    return output.detach()


def result_of(output: Any, module: torch.nn.Module) -> torch.Tensor:
    """Logits of images or of their pixels, or the pooled features of a bare model."""
    if isinstance(output, torch.Tensor):
        return output.detach()
    if getattr(output, "logits", None) is not None:
        return output.logits.detach()
    for name in ("image_embeds", "pooler_output"):
        if getattr(output, name, None) is not None:
            return getattr(output, name).detach().flatten(1)
    hidden = output.last_hidden_state.detach()  # an encoder without pooling: its class token
    return hidden[:, 0] if hidden.ndim == 3 else hidden.mean((2, 3))


def build_reference(entry: Entry, *, reduced: bool = True) -> Reference:
    """The reference of a variant, with its initial weights; giants in reduced depth if asked."""
    given = {**dict(entry.arguments), **(dict(entry.reduced) if reduced else {})}
    return make_reference(entry.source, entry.build, given)


def make_reference(source: str, build: str, arguments: Mapping[str, Any]) -> Reference:
    """A model by its source's own name and arguments.

    Args:
      source: "timm", "torchvision", "transformers", "npz" for a timm model whose weights travel in
        big_vision's files, "detr" for the original DETR, "yolox" for pixeltable-yolox's,
        "nanodet", "dit", "fid" for the Inception that an FID is measured with, or "diffusers".
      build: an architecture of timm's, a builder of torchvision's or the path of a class of its
        own ("torchvision.models...", also among the arguments), a class of transformers' or of
        diffusers'.
      arguments: keywords of the builder; for transformers of the config.
    """
    arguments = dict(arguments)
    if source in ("timm", "npz"):
        module = timm.create_model(build, **arguments)
    elif source == "torchvision":
        parts = {
            k: locate(v) if str(v).startswith("torchvision.") else v for k, v in arguments.items()
        }
        if build.startswith("torchvision."):
            # A class, where no builder has such an architecture.
            module = cast(Any, locate(build))(**parts)
        else:
            if is_detector(build) or build.startswith("deeplab"):
                parts.setdefault("weights_backbone", None)
            module = torchvision.models.get_model(build, weights=None, **parts)
            if build.startswith("fasterrcnn"):
                module = reference_faster_rcnn.raw(module)
            if build.startswith(DENSE):
                module = reference_dense.raw(module)
            if build.startswith("deeplab"):
                module = reference_deeplab.raw(module)
    elif source == "detr":
        module = DETR(**arguments)
    elif source == "nanodet":
        module = NanoDet(**arguments)
    elif source == "yolox":
        from vision_jax.certify import reference_yolox  # the package is installed by hand

        module = reference_yolox.Yolox(**arguments) if arguments else reference_yolox.named(build)
    elif source == "dit":
        module = DiT(**arguments)
    elif source == "fid":
        from vision_jax.certify import reference_inception  # pytorch-fid, which no other needs

        module = reference_inception.build()
    elif source == "diffusers":
        module = reference_diffusers.build(build, arguments)
    else:
        model_class = getattr(transformers, build)
        config = model_class.config_class(**arguments)
        module = model_class._from_config(config, **_attention(model_class))
        if build.startswith("Eomt"):
            module = reference_eomt.prepare(module)
    return Reference(source, module.eval(), build, arguments)


def _attention(model_class: Any) -> dict[str, str]:
    # The plain form rounds its softmax to float32, in float64 too.
    # A detector's backbone would be asked for it too, and has none; for the rest it is the default.
    composed = hasattr(model_class.config_class, "backbone_config")
    return {"attn_implementation": "sdpa"} if model_class._supports_sdpa and not composed else {}


def rebuild(
    table: Table,
    family: str,
    arguments: Mapping[str, Any],
    params: Mapping[str, np.ndarray],
    preprocessing: Mapping[str, Any] | None,
    folder: Path,
) -> Reference:
    """The model that the source library makes of what we write, loaded with strict=True.

    Raises:
      RuntimeError: the library finds a tensor missing, unexpected or of another shape.
    """
    write_package(folder, params, family, arguments, to=table.source, preprocessing=preprocessing)
    if table.source == "npz":
        config = table.config(arguments)  # the file says no more than its tensors
        given = {**config["model_args"], "num_classes": arguments["num_classes"]}
        given["in_chans"] = arguments["in_channels"]
        reference = make_reference("npz", config["architecture"], given)
        load_npz(reference.module, folder / NPZ_FILE)
        return reference
    if table.source == "diffusers":
        return Reference("diffusers", *reference_diffusers.load(folder), {})
    config = read_config(folder)
    if table.source == "transformers":
        model_class = getattr(transformers, config["architectures"][0])
        # These two have a pooler on top unless they are asked not to.
        bare = model_class in (transformers.ViTModel, transformers.DeiTModel)
        module, report = model_class.from_pretrained(
            folder,
            output_loading_info=True,
            **_attention(model_class),
            **({"add_pooling_layer": False} if bare else {}),
        )
        wrong = {kind: names for kind, names in report.items() if names}
        if wrong:
            raise RuntimeError(f"transformers finds {wrong}")
        return Reference("transformers", module.eval(), config["architectures"][0], {})
    if table.source == "torchvision":
        reference = make_reference("torchvision", config["model"], config["kwargs"])
    elif table.source == "detr":
        reference = make_reference("detr", "DETR", table.config(arguments))
    elif table.source == "dit":
        reference = make_reference("dit", "DiT", _original(arguments))
    elif table.source == "fid":
        reference = make_reference("fid", "fid", {})
    elif table.source == "nanodet":
        reference = make_reference("nanodet", "nanodet_g", table.config(arguments))
    elif table.source == "yolox":
        given = {**table.config(arguments), "num_classes": arguments["num_classes"]}
        reference = make_reference("yolox", "YOLOX", given)
    else:
        given = {**config["model_args"], "num_classes": config["num_classes"]}
        reference = make_reference("timm", config["architecture"], given)
    reference.module.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return reference


def _original(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A DiT's arguments by their original names."""
    return {
        "input_size": arguments["image_size"][0],
        "patch_size": arguments["patch_size"],
        "in_channels": arguments["in_channels"],
        "hidden_size": arguments["width"],
        "depth": arguments["depth"],
        "num_heads": arguments["num_heads"],
        "mlp_ratio": arguments["mlp_width"] / arguments["width"],
        "num_classes": arguments["num_classes"],
        "learn_sigma": arguments["learned_variance"],
        "predicts": arguments["predicts"],
    }


def load_weights(reference: Reference, path: Path) -> None:
    """Loads a file into the reference, strictly.

    Raises:
      UserError: the file is not this model's.
    """
    if reference.source == "npz":
        try:
            return load_npz(reference.module, path)
        except RuntimeError as error:
            raise UserError(f"{path} is not for {reference.build}: {error}") from None
    tensors = {k: torch.from_numpy(v) for k, v in read_weights(str(path)).tensors.items()}
    try:
        reference.module.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise UserError(
            f"{path} is not for {reference.build}: {str(error).splitlines()[-1]}"
        ) from None


def load_npz(module: torch.nn.Module, path: Path) -> None:
    """Loads an AugReg or big_vision file by timm's own reader, which is made strict here.

    Raises:
      RuntimeError: the file leaves a parameter as it was, or has a tensor that none takes.
    """
    for parameter in module.parameters():
        parameter.data.fill_(float("nan"))
    try:
        cast(Any, module).load_pretrained(str(path))
    except KeyError as error:
        raise RuntimeError(f"timm finds no {error} in the file") from None
    for name, parameter in module.named_parameters():
        if parameter.isnan().any():
            raise RuntimeError(f"the file has nothing for {name}")
    with np.load(path) as file:
        count = sum(file[name].size for name in file.files)
    if count != (own := sum(parameter.numel() for parameter in module.parameters())):
        raise RuntimeError(f"the file has {count} numbers, the model {own}")


def _save_npz(module: torch.nn.Module, folder: Path) -> Path:
    """Writes a timm model as an npz file, and has timm load that again.

    So the reference computes with what timm understands the file to be.
    """
    tensors = {name: value.numpy() for name, value in module.state_dict().items()}
    vit = cast(Any, module)
    given = {
        "num_heads": vit.blocks[0].attn.num_heads,
        "act_layer": "gelu_tanh",
        "img_size": list(vit.patch_embed.img_size),
    }
    config = {"global_pool": vit.global_pool, "model_args": given}
    shapes = {name: value.shape for name, value in tensors.items()}
    table = find_table(shapes)
    inferred = infer_arguments(table, shapes, {"config": config})
    arguments = {**FAMILIES[table.family].defaults, **inferred}
    params = {
        path: array
        for rule in table.rules(arguments)
        if isinstance(rule, Rule) and all(name in tensors for name in rule.names)
        for path, array in zip(
            rule.paths, rule.layout.to_tree([tensors[name] for name in rule.names]), strict=True
        )
    }
    write_package(folder, params, table.family, arguments, to="npz")
    load_npz(module, folder / NPZ_FILE)
    return folder / NPZ_FILE


def license_of(entry: Entry) -> str:
    """The license of timm's published weights, from its own metadata; "" where it names none."""
    if entry.source != "timm":
        return ""
    return str(timm.get_pretrained_cfg(entry.build).license or "")


def full_arguments(entry: Entry) -> tuple[str, dict[str, Any]]:
    """(family, arguments) of a giant in its whole depth, from shapes alone."""
    if entry.source == "transformers":
        reference = build_reference(entry)
        with tempfile.TemporaryDirectory() as folder:
            family, arguments = recognize(read_weights(reference.save(Path(folder))))
        whole = getattr(transformers, entry.build).config_class(**dict(entry.arguments))
        if pairs := dict(arguments.get("encoder_arguments", ())):
            pairs["depths"] = tuple(whole.backbone_config.depths)
            return family, {**arguments, "encoder_arguments": tuple(pairs.items())}
        if "depths" in arguments:
            return family, {**arguments, "depths": tuple(whole.depths)}
        return family, {**arguments, "depth": whole.num_hidden_layers}
    try:
        with torch.device("meta"):
            reference = build_reference(entry, reduced=False)
    except NotImplementedError:  # torchvision's RegNet computes its widths by tensors
        reference = build_reference(entry, reduced=False)
    shapes = {name: tuple(value.shape) for name, value in reference.module.state_dict().items()}
    config = {"architecture": entry.build, "model_args": dict(entry.arguments)}
    if entry.source == "diffusers":
        config = dict(cast(Any, reference.module).config)
    pool = getattr(reference.module, "global_pool", None)
    if isinstance(pool, str):
        config["global_pool"] = pool
    table = find_table(shapes)
    arguments = infer_arguments(table, shapes, {"config": config})
    return table.family, {**FAMILIES[table.family].defaults, **arguments}
