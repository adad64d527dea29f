"""Warnings of the libraries that we are compared with, about how they call each other."""

IGNORED = (
    "Please import `gaussian_filter`:DeprecationWarning:foolbox.attacks.blur",
    # Of timm's resampling of position tables, which calls torch's and indexes by lists.
    r"torch\.searchsorted\(\). input value tensor is non-contiguous:UserWarning:timm",
    "Using a non-tuple sequence for multidimensional indexing:UserWarning:timm",
    "`is_gradient_checkpointing` is deprecated:FutureWarning:transformers",
    # PEFT doubts the biases of a LoRA with lora_bias, which it wrote itself,
    "Adapter 'default'. [0-9]+ LoRA tensor.s. have invalid shape:UserWarning:peft",
    # and says so where one setting for all layers does not fit each of them.
    "fan_in_fan_out is set to True but the target module is:UserWarning:peft",
)


def pytest_configure(config):
    for line in IGNORED:
        config.addinivalue_line("filterwarnings", f"ignore:{line}")
