"""Generation: how noise is mixed in while it is learned, and how images are made."""

from vision_jax.config.fields.field import (
    ABOVE_0,
    ANY,
    COUNT,
    GENERATION,
    NUMBER,
    SHARE,
    WORDS,
    Check,
    field,
    one_of,
)

_INTERVAL = Check(
    lambda value: (
        len(value) == 2 and all(map(NUMBER.fits, value)) and 0 <= value[0] <= value[1] <= 1
    ),
    "two times between 0 and 1, the smaller first",
)

FIELDS = (
    field(
        "data.classes",
        (),
        WORDS,
        "names of the classes to learn; () takes all",
        GENERATION,
    ),
    field(
        "text.tower",
        "",
        ANY,
        "a SigLIP, or a run of image_text, whose text tower reads captions; empty: classes",
        GENERATION,
    ),
    field(
        "latents.autoencoder",
        "",
        ANY,
        "weights of the autoencoder whose latents are learned, as model.weights; empty: pixels",
        GENERATION,
    ),
    field(
        "latents.cache",
        "",
        ANY,
        "folder where latents are kept; empty: vision_jax/latents in the user's cache folder",
        GENERATION,
    ),
    field("latents.max_gb", 50.0, ABOVE_0, "what that folder may hold, in GB", GENERATION),
    field(
        "flow.time_mean",
        0.0,
        NUMBER,
        "mean of the logits of the times that are drawn; below 0 there is more noise",
        GENERATION,
    ),
    field("flow.time_std", 1.0, ABOVE_0, "their standard deviation", GENERATION),
    field(
        "flow.unconditional",
        0.1,
        SHARE,
        "share of the training images whose class is left out, which guidance needs",
        GENERATION,
    ),
    field("sample.method", "heun", one_of("heun", "euler"), "of integration", GENERATION),
    field(
        "sample.steps",
        20,
        COUNT,
        "of the integration, heun asks the model twice in each",
        GENERATION,
    ),
    field(
        "sample.guidance",
        1.5,
        ABOVE_0,
        "scale of the class's guidance; 1 for none, which asks the model half as much",
        GENERATION,
    ),
    field(
        "sample.interval",
        (0.0, 1.0),
        _INTERVAL,
        "times between which there is guidance, from 0, noise, to 1, image",
        GENERATION,
    ),
    field(
        "sample.shift",
        1.0,
        ABOVE_0,
        "of the times towards noise, above 1 where images are large",
        GENERATION,
    ),
)
