"""Smaller models: sparse and quantized kernels, `quantize` and `compress`."""

from vision_jax.config.fields.field import (
    ABOVE_0,
    ANY,
    COUNT,
    FROM_0,
    HEADS,
    INSIDE,
    MEASURED,
    NOT_NEGATIVE,
    RULES,
    SHARE,
    SHRUNK,
    WORDS,
    Check,
    every,
    field,
    one_of,
)

FIELDS = (
    # Sparse kernels.
    field(
        "mask.form",
        "magnitude",
        one_of("magnitude", "2:4"),
        "which weights are zero: the smallest of a kernel, or two of each four inputs of an output",
    ),
    field("mask.share", 0.5, SHARE, "of a kernel's weights that are zero, of magnitude"),
    field("mask.rules", (".*kernel",), RULES, "kernels to mask: regexes over whole paths"),
    field(
        "mask.keep",
        HEADS,
        RULES,
        "kernels that stay whole all the same, heads and box outputs at first; so does the first"
        " layer",
    ),
    # Quantization.
    field(
        "quantize.form",
        "nf4",
        one_of("int8", "nf4"),
        "int8 with a scale an output, or 4-bit NormalFloat in blocks (QLoRA's)",
    ),
    field("quantize.rules", (".*kernel",), RULES, "kernels to quantize: regexes over whole paths"),
    field(
        "quantize.keep",
        HEADS,
        RULES,
        "kernels that stay in float all the same, heads and box outputs at first; so does the first"
        " layer",
    ),
    field("quantize.block_size", 64, COUNT, "weights of an output that share a scale, of nf4"),
    field("quantize.double", True, ANY, "quantize the scales too (double quantization), of nf4"),
    field(
        "quantize.activations",
        "float",
        one_of("float", "int8"),
        "of int8: the layers' inputs too, by the scale that each row or image asks for",
    ),
    field(
        "quantize.train",
        False,
        ANY,
        "of int8: train kernels that are rounded in the forward pass alone (QAT); else they are"
        " frozen",
    ),
    # Quantization of a finished run: `vision_jax quantize`.
    field(
        "ptq.form", "int8", one_of("int8", "nf4"), "int8, or 4-bit NormalFloat in blocks", *MEASURED
    ),
    field(
        "ptq.activations",
        "float",
        one_of("float", "dynamic", "static"),
        "of int8, the layers' inputs: float, int8 by each one's own scale, or by a calibrated one",
        *MEASURED,
    ),
    field(
        "ptq.rules",
        (".*kernel",),
        RULES,
        "kernels to quantize: regexes over whole paths",
        *MEASURED,
    ),
    field(
        "ptq.keep",
        HEADS,
        RULES,
        "kernels that stay in float all the same, heads and box outputs at first; so does the first"
        " layer",
        *MEASURED,
    ),
    field(
        "ptq.block_size", 64, COUNT, "weights of an output that share a scale, of nf4", *MEASURED
    ),
    field(
        "ptq.images",
        128,
        COUNT,
        "training images that ranges and errors are measured on",
        *MEASURED,
    ),
    field(
        "ptq.observer",
        "mse",
        one_of("absmax", "percentile", "mse"),
        "how far a static scale reaches: the largest input, a percentile, the least squared error",
        *MEASURED,
    ),
    field(
        "ptq.percentile",
        99.99,
        Check(lambda value: 0 < value <= 100, "above 0 and at most 100"),
        "percent of the inputs' magnitudes that are not clipped, of that observer",
        *MEASURED,
    ),
    field(
        "ptq.max_error",
        0.05,
        NOT_NEGATIVE,
        "relative error of the outputs; the most sensitive layers, or their inputs, stay in float",
        *MEASURED,
    ),
    field(
        "ptq.requantize",
        False,
        ANY,
        "merge adapters into a 4-bit base again, though rounding takes back what they learned",
        *MEASURED,
    ),
    # `vision_jax compress`: the one teacher pruned, taught by itself, trained for int8, exported.
    field(
        "compress.by",
        "prune",
        one_of("prune", "factorize"),
        "fewer channels and heads, or two narrow products of each layer",
        *SHRUNK,
    ),
    field(
        "compress.keep",
        0.5,
        INSIDE,
        "share of each group of channels that stays; of factorize, of the products of all layers",
        *SHRUNK,
    ),
    field(
        "compress.what",
        (),
        WORDS,
        "of prune: kinds of channels to cut, of channels, inner, mlp, heads and layers; empty: all "
        "that are free where they are zero",
        *SHRUNK,
    ),
    field(
        "compress.score",
        "taylor",
        one_of("magnitude", "taylor"),
        "of prune: what stays, the largest weights or what the loss needs",
        *SHRUNK,
    ),
    field(
        "compress.int8_steps",
        100,
        FROM_0,
        "updates with kernels, and inputs as of ptq.activations, rounded to int8; 0 rounds after"
        " training alone",
        *SHRUNK,
    ),
    field("compress.int8_lr", 2e-4, ABOVE_0, "learning rate of these updates", *SHRUNK),
    field(
        "compress.formats",
        ("onnx", "tflite"),
        Check(
            every(one_of("stablehlo", "onnx", "tflite", "openvino").fits),
            "some of stablehlo, onnx, tflite and openvino",
        ),
        "formats of the files that are written and timed",
        *SHRUNK,
    ),
)
