"""Training steps beside timm, PEFT and transformers: the same weights, batch, optimizer and loss.

    pip install -e '.[parity]'
    python -m benchmarks.training                         # one thread
    python -m benchmarks.training --threads=0             # all cores
    python -m benchmarks.training --jobs ResNet --peers compile channels

AdamW, clipping, label smoothing 0.1; no dropout and no augmentation, so that the losses agree.
benchmarks/beside.py says what the columns are.
"""

from benchmarks import beside
from benchmarks.beside import Call, Job

HOWS = ("eager", "channels", "compile")
MAIN = {  # what configs/vit_lora.py trains, in timm's words
    "img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4, "mlp_ratio": 2,
    "class_token": False, "global_pool": "avg", "fc_norm": True,
}  # fmt: skip
LORA = {
    "recipes": ("lora",),
    "lora.rules": (r"block_\d+/attn/(qkv|proj)/kernel", r"block_\d+/mlp/fc\d/kernel"),
    "trainable": ("head/.*",),
}
DETR = {
    "trainable": (r"backbone/stage_[1-3]/.*(conv\d?|downsample_conv)/kernel", "(?!backbone).*"),
    "model.freeze_norm": True,
}
DIT = {  # DiT-S/2 in diffusers' words; latents of 4 channels would ask for their autoencoder
    "num_attention_heads": 6, "attention_head_dim": 64, "num_layers": 12, "in_channels": 3,
    "out_channels": 3, "norm_eps": 1e-6,
}  # fmt: skip
SMALL_DIT = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1}
SMALL_VIT = {"embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 32}
SMALL_MAE = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
    "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 64, "patch_size": 8,
}  # fmt: skip
SMALL_DETR = {
    "backbone": "resnet18", "d_model": 32, "encoder_layers": 1, "decoder_layers": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
}  # fmt: skip


def classifier(
    name: str, build: str, batch_size: int, size: int = 224, lora: int = 0, **arguments
) -> Job:
    """A step of all of a timm model, or of adapters of its blocks and the head."""
    shared = {"batch_size": batch_size, "image_size": size, "classes": 10}
    fields = {**LORA, "lora.rank": lora} if lora else {}
    peer = {**shared, "build": build, "arguments": arguments, "lora": lora}
    return Job(
        f"{name}, {size} px, batch {batch_size}",
        ("ours.train", {**shared, "fields": fields}),
        {how: ("peers.train", {**peer, "how": how}) for how in HOWS},
    )


def detr(batch_size: int, size: int, **arguments) -> Job:
    """A step of all of DETR-R50 but its first stage and its BatchNorms."""
    shared = {"batch_size": batch_size, "image_size": size, "classes": 91}
    ours: Call = ("ours.train", {**shared, "task": "detection", "fields": DETR})
    peer = {**shared, "arguments": arguments}
    return Job(
        f"DETR-R50, {size} px, batch {batch_size}",
        ours,
        {how: ("peers.train", {**peer, "how": how}) for how in HOWS},
        tolerance=0.3,  # see peers.py
    )


def mae(batch_size: int, size: int, **arguments) -> Job:
    """A step of a masked autoencoder, ViT-B and the paper's decoder, of which 75 % are hidden."""
    shared = {"batch_size": batch_size, "image_size": size}
    fields = {"model.mean": (0.5,) * 3, "model.std": (0.25,) * 3}
    ours: Call = ("ours.train", {**shared, "classes": 1, "task": "pretraining", "fields": fields})
    peer = {**shared, "arguments": arguments}
    return Job(
        f"MAE, {size} px, batch {batch_size}",
        ours,
        {how: ("peers.train_mae", {**peer, "how": how}) for how in HOWS},
        tolerance=0.1,  # other masks
    )


def dit(batch_size: int, size: int, lora: int = 0, **arguments) -> Job:
    """A step of flow matching on a DiT, all of it or adapters of its blocks."""
    shared = {"batch_size": batch_size, "image_size": size, "classes": 1000}
    fields = {"model.arguments": (("predicts", "velocity"),), "optim.ema_decay": 0.0}
    if lora:  # diffusers' q, k and v are layers of their own
        parts = {"lora.rank": lora, "lora.qkv_parts": "q,k,v", "trainable": ("class_embed",)}
        fields |= {**LORA, **parts}
    peer = {**shared, "arguments": {**DIT, **arguments}, "lora": lora}
    return Job(
        f"{'LoRA ' if lora else ''}DiT-S/2, {size} x {size}, batch {batch_size}",
        ("ours.train", {**shared, "task": "generation", "fields": fields}),
        {how: ("peers.train_dit", {**peer, "how": how}) for how in HOWS},
        tolerance=0.1,  # other noise
    )


def jobs(small: bool = False) -> list[Job]:
    if small:
        return [
            classifier("LoRA ViT", "vit_tiny_patch16_224", 2, 32, lora=2, **SMALL_VIT),
            detr(1, 64, **SMALL_DETR),
            mae(2, 32, **SMALL_MAE),
            dit(2, 32, **SMALL_DIT),
            dit(2, 32, 2, **SMALL_DIT),
        ]
    return [
        classifier("main job, LoRA", "vit_tiny_patch16_224", 64, 32, lora=8, **MAIN),
        classifier("LoRA ViT-S/16", "vit_small_patch16_224", 8, lora=8),
        classifier("LoRA ViT-B/16", "vit_base_patch16_224", 4, lora=8),
        classifier("ViT-S/16", "vit_small_patch16_224", 8),
        classifier("ViT-B/16", "vit_base_patch16_224", 4),
        classifier("ResNet-50", "resnet50", 8),
        classifier("ConvNeXt-T", "convnext_tiny", 4),
        classifier("Swin-T", "swin_tiny_patch4_window7_224", 4, drop_path_rate=0.0),
        classifier("MobileNetV2", "mobilenetv2_100", 16),
        classifier("RegNetY-4GF", "regnety_040", 4),
        detr(2, 480),
        mae(8, 224),
        dit(8, 32),
        dit(8, 32, 8),
    ]


def main() -> int:
    """Prints the table."""
    flags = beside.parser(__doc__).parse_args()
    return beside.run(jobs(flags.small), flags)


if __name__ == "__main__":
    raise SystemExit(main())
