"""The peers' sides of the tables: timm, PEFT, transformers and torchattacks, as people run them.

Images are normalized beforehand, which ours are in the step. `how` is a peer's kind: "eager",
"channels" (channels last), "compile" (torch.compile), or "compile channels".
"""

import contextlib
import io
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import timm
import torch
import transformers
from timm.models import save_for_hf
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import beside
from benchmarks.beside import Side

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLIP = {"classification": 1.0, "detection": 0.1}  # our defaults
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
DETR_FROZEN = ("model.conv1", "model.layer1")  # as in the paper, besides every BatchNorm

transformers.utils.logging.set_verbosity_error()


def train(
    folder: Path,
    *,
    batch_size: int,
    image_size: int,
    classes: int,
    build: str = "",
    arguments: dict[str, Any] | None = None,
    how: str = "eager",
    lora: int = 0,
    teacher: str = "",
    attack: int = 0,
    bfloat16: bool = False,
) -> Side:
    """A step of AdamW on a timm model, with LoRA, a teacher, or after PGD.

    Args:
      folder: where the weights are written.
      batch_size: images of a step.
      image_size: pixels a side.
      classes: of the head.
      build: timm's name of the model; empty: DETR-R50 of transformers.
      arguments: of the model.
      how: see above.
      lora: rank of adapters on all linear layers of the blocks.
      teacher: timm's name of a model whose probabilities count half; written beneath `folder`.
      attack: steps of PGD before each update.
      bfloat16: under autocast.
    """
    torch.manual_seed(0)
    if not build:
        return _detr(folder, batch_size, image_size, classes, how, bfloat16, arguments or {})
    model = write_timm(folder, build, classes, arguments or {})
    taught = None
    if teacher:
        taught = write_timm(folder / "teacher", teacher, classes, arguments or {})
        taught = _like(taught.to(DEVICE).eval().requires_grad_(False), how)
    if lora:
        model = peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=lora,
                lora_alpha=16,
                target_modules=["qkv", "attn.proj", "fc1", "fc2"],
                modules_to_save=["head"],
            ),
        )
    images, labels = batch_of(batch_size, image_size, classes, how)
    seen = _like(model.to(DEVICE).train(), how)

    def loss_of() -> torch.Tensor:
        found = ascend(seen, images, labels, attack) if attack else images
        logits = seen(found)
        loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
        if taught is None:
            return loss
        with torch.no_grad():
            wanted = taught(found).log_softmax(-1)
        kl = torch.nn.functional.kl_div(
            logits.log_softmax(-1), wanted, reduction="batchmean", log_target=True
        )
        return (loss + kl) / 2

    return stepping(model, loss_of, CLIP["classification"], bfloat16)


def write_timm(folder: Path, build: str, classes: int, arguments: dict[str, Any]) -> Any:
    """A timm model of random weights, written for the other sides, or read if that was done."""
    model = timm.create_model(build, num_classes=classes, **arguments)
    file = folder / "model.safetensors"
    if file.exists():
        from safetensors.torch import load_file

        model.load_state_dict(load_file(file))
        return model
    head = model.get_classifier().weight
    torch.nn.init.normal_(head, std=head.shape[1] ** -0.5)  # some start at 0: every loss is equal
    model.pretrained_cfg |= {"mean": MEAN, "std": STD}
    save_for_hf(model, folder, model_config={"model_args": arguments}, safe_serialization=True)
    return model


def train_mae(
    folder: Path,
    *,
    batch_size: int,
    image_size: int,
    arguments: dict[str, Any] | None = None,
    how: str = "eager",
) -> Side:
    """A step of AdamW on all of transformers' ViTMAE, which draws the masks itself."""
    torch.manual_seed(0)
    config = transformers.ViTMAEConfig(
        image_size=image_size, norm_pix_loss=True, **(arguments or {})
    )
    model = transformers.ViTMAEForPreTraining(config)
    if (folder / "model.safetensors").exists():
        model = transformers.ViTMAEForPreTraining.from_pretrained(folder)
        model.vit.embeddings.position_embeddings.requires_grad_(False)  # constants, but not as read
        model.decoder.decoder_pos_embed.requires_grad_(False)
    else:
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
            model.save_pretrained(folder)
    images, _ = batch_of(batch_size, image_size, 1, how)
    seen = _like(model.to(DEVICE).train(), how)
    return stepping(model, lambda: seen(images).loss, CLIP["classification"], False)


def train_dit(
    folder: Path,
    *,
    batch_size: int,
    image_size: int,
    classes: int,
    arguments: dict[str, Any] | None = None,
    how: str = "eager",
    lora: int = 0,
) -> Side:
    """A step of flow matching on all of diffusers' DiTTransformer2DModel, or of LoRA by PEFT.

    Its blocks each have an embedding of time and class; they share one here, as ours do, so that
    both sides train as many parameters.
    """
    import diffusers

    torch.manual_seed(0)
    sizes = {"sample_size": image_size, "num_embeds_ada_norm": classes, **(arguments or {})}
    model = diffusers.DiTTransformer2DModel(**sizes)
    embedding = model.transformer_blocks[0].norm1.emb
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(embedding.state_dict())
    if (folder / "config.json").exists():
        model = diffusers.DiTTransformer2DModel.from_pretrained(folder)
    else:
        model.save_pretrained(folder)
    for block in model.transformer_blocks:
        block.norm1.emb = model.transformer_blocks[0].norm1.emb
    if lora:
        targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
        config = peft.LoraConfig(r=lora, lora_alpha=16, target_modules=targets)
        model = peft.inject_adapter_in_model(config, model)
        model.transformer_blocks[0].norm1.emb.class_embedder.requires_grad_(True)
    found = beside.images(batch_size, image_size, model.config.in_channels)
    clean = 2 * torch.from_numpy(found).permute(0, 3, 1, 2).float().to(DEVICE) / 255 - 1
    labels = torch.from_numpy(beside.labels(batch_size, classes)).to(DEVICE)
    seen = _like(model.to(DEVICE).train(), how)

    def loss_of() -> torch.Tensor:
        noise, time = torch.randn_like(clean), torch.randn(len(clean), device=DEVICE).sigmoid()
        share = time[:, None, None, None]
        mixed = share * clean + (1 - share) * noise
        made = seen(mixed, timestep=time, class_labels=labels).sample
        return torch.nn.functional.mse_loss(made, clean - noise)

    return stepping(model, loss_of, CLIP["classification"], False)


def stepping(
    model: Any,
    loss_of: Callable[[], torch.Tensor],
    clip: float,
    bfloat16: bool,
    rate: float = 1e-3,
) -> Side:
    """AdamW steps on a loss."""
    parameters = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, fused=DEVICE == "cuda")

    def run() -> float:
        optimizer.zero_grad()
        with _autocast(bfloat16):
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        return float(loss.detach())

    trainable = sum(x.numel() for x in parameters)
    return Side(run, lambda: {**_facts(run), "trainable": trainable})


def infer(
    folder: Path,
    *,
    batch_size: int,
    image_size: int,
    classes: int,
    build: str = "",
    arguments: dict[str, Any] | None = None,
    how: str = "eager",
) -> Side:
    """The model's outputs for a batch."""
    torch.manual_seed(0)
    if build:
        model = write_timm(folder, build, classes, arguments or {})
    else:
        model = write_detr(folder, classes, arguments or {})
    images, _ = batch_of(batch_size, image_size, classes, how)
    seen = _like(model.to(DEVICE).eval(), how)

    def run() -> float:
        with torch.inference_mode():
            found = seen(images)
        logits = found if build else found.logits
        return float(logits.float().square().mean())

    return Side(run, lambda: _facts(run))


def attack(
    folder: Path,
    *,
    batch_size: int,
    image_size: int,
    classes: int,
    steps: int,
    build: str,
    arguments: dict[str, Any] | None = None,
    how: str = "eager",
) -> Side:
    """torchattacks' PGD, from the images themselves."""
    import torchattacks

    torch.manual_seed(0)
    model = write_timm(folder, build, classes, arguments or {}).to(DEVICE).eval()
    model.requires_grad_(False)
    seen = _like(Normalized(model), how)
    images, labels = batch_of(batch_size, image_size, classes, how, normalized=False)
    pgd = torchattacks.PGD(seen, 4 / 255, 1 / 255, steps, random_start=False)

    def run() -> float:
        return float((pgd(images, labels) - images).square().mean() * 1e4)

    return Side(run, lambda: _facts(run))


def integrate(
    folder: Path,
    *,
    batch_size: int,
    image_size: int,
    classes: int,
    nodes: int,
    build: str,
    arguments: dict[str, Any] | None = None,
    how: str = "captum",
) -> Side:
    """captum's integrated gradients: all nodes at once, or in parts of one node."""
    import captum.attr

    torch.manual_seed(0)
    model = write_timm(folder, build, classes, arguments or {}).to(DEVICE).eval()
    model.requires_grad_(False)
    images, labels = batch_of(batch_size, image_size, classes, how, normalized=False)
    method = captum.attr.IntegratedGradients(Normalized(model))
    at_once = batch_size if how == "parts" else None

    def run() -> float:
        found = method.attribute(images, target=labels, n_steps=nodes, internal_batch_size=at_once)
        return float(found.square().mean() * 1e4)

    return Side(run, lambda: _facts(run))


class Normalized(torch.nn.Module):
    """A model of images in [0, 1]."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model((images - MEAN[0]) / STD[0])


def ascend(model: Any, images: torch.Tensor, labels: torch.Tensor, steps: int) -> torch.Tensor:
    """PGD on normalized images, as people write it into a training loop."""
    epsilon = 4 / 255 / STD[0]
    found = images
    for _ in range(steps):
        found = found.detach().requires_grad_()
        loss = torch.nn.functional.cross_entropy(model(found), labels)
        move = torch.autograd.grad(loss, found)[0].sign() * (epsilon / steps * 2.5)
        found = images + (found + move - images).clamp(-epsilon, epsilon)
    return found.detach()


# DETR ---------------------------------------------------------------------------------------------


def write_detr(folder: Path, classes: int, arguments: dict[str, Any]) -> Any:
    config = transformers.DetrConfig(
        **{"backbone": "resnet50", "dropout": 0.0, **arguments},
        num_labels=classes,
    )
    model = transformers.DetrForObjectDetection(config)
    if not (folder / "model.safetensors").exists():
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
            model.save_pretrained(folder)
        transformers.DetrImageProcessor(image_mean=MEAN, image_std=STD).save_pretrained(folder)
        return model
    return transformers.DetrForObjectDetection.from_pretrained(folder)


def _detr(folder, batch_size, image_size, classes, how, bfloat16, arguments) -> Side:
    model = write_detr(folder, classes, arguments).to(DEVICE).train()
    # Only now: our import refuses weights that were trained so by transformers 5, which normalizes
    # what a layer of the decoder hands to the next. The losses then agree in size alone.
    model.config.auxiliary_loss = model.model.decoder.config.auxiliary_loss = True
    for name, parameter in model.model.backbone.named_parameters():
        parameter.requires_grad_(not name.startswith(DETR_FROZEN))
    images, _ = batch_of(batch_size, image_size, classes, how)
    mask = torch.ones((batch_size, image_size, image_size), dtype=torch.int64, device=DEVICE)
    found = torch.from_numpy(beside.boxes(batch_size)).to(DEVICE)
    label = torch.from_numpy(beside.labels(found.shape[0] * found.shape[1], classes)).to(DEVICE)
    targets = [
        {"class_labels": of, "boxes": each}
        for of, each in zip(label.reshape(found.shape[:2]), found, strict=True)
    ]
    seen = _like(model, how)
    return stepping(
        model,
        lambda: seen(pixel_values=images, pixel_mask=mask, labels=targets).loss,
        CLIP["detection"],
        bfloat16,
    )


# What all share -----------------------------------------------------------------------------------


def batch_of(count: int, size: int, classes: int, how: str, normalized: bool = True) -> Any:
    """(f32[B, 3, H, W] on the device, labels)."""
    images = torch.from_numpy(beside.images(count, size)).permute(0, 3, 1, 2).float() / 255
    if normalized:
        images = (images - MEAN[0]) / STD[0]
    form = torch.channels_last if "channels" in how else torch.contiguous_format
    labels = torch.from_numpy(beside.labels(count, classes))
    return images.contiguous(memory_format=form).to(DEVICE), labels.to(DEVICE)


def _like(model: Any, how: str) -> Any:
    if "channels" in how:
        model = model.to(memory_format=torch.channels_last)
    return torch.compile(model) if "compile" in how else model


def _autocast(bfloat16: bool) -> Any:
    return torch.autocast(DEVICE, torch.bfloat16) if bfloat16 else nullcontext()


def _facts(run: Callable[[], float]) -> dict[str, Any]:
    peak = {"device_bytes": torch.cuda.max_memory_allocated()} if DEVICE == "cuda" else {}
    try:
        with FlopCounterMode(display=False) as counter:
            run()
    except Exception:  # it doesn't go together with every compiled model
        return peak
    return {**peak, "flops": float(counter.get_total_flops())}
