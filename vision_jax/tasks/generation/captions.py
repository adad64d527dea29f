"""The frozen text tower whose embeddings say what a generator is asked for.

A caption is one vector, the tower's for the whole text, and goes where the class goes: through an
MLP onto the time's embedding, and so into the norms of all blocks (the pooled text of Stable
Diffusion 3, Esser et al. 2024, section 4). No caption is the empty text's.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vision_jax import convert
from vision_jax.data.captions import load_tokenizer, tokenize
from vision_jax.errors import UserError
from vision_jax.files import expand
from vision_jax.models import families
from vision_jax.models.families import FAMILIES
from vision_jax.tasks.generation.autoencoder import computed_by, state_of
from vision_jax.trees import paths

BATCH = 32  # texts at once, always, so that each is the same in every set of captions
NOTHING = ""  # the text of no caption


@dataclass(frozen=True, eq=False)  # compared and hashed by identity
class Tower:
    """A text tower, whose arrays are read when they are asked for.

    Attributes:
      model: the flax module of both towers.
      weights: that it is of.
      tokenizer: a tokenizers.Tokenizer.
      sha256: of the tokenizer, as it was read: its padding is set when it is used.
    """

    model: Any
    weights: convert.Weights
    tokenizer: Any
    sha256: str

    @cached_property
    def width(self) -> int:
        """E, the numbers of an embedding."""
        return self._like["text"]["head"]["bias"].shape[0]

    @property
    def identity(self) -> dict[str, Any]:
        """What embeddings depend on beside the texts."""
        own = {"tower": self.weights.sha256, "tokenizer": self.sha256}
        return {**own, **computed_by(self.model)}

    @property
    def made_with(self) -> tuple[tuple[str, str], ...]:
        """(origin, sha256) of the weights and of the tokenizer."""
        origin = self.weights.origin
        return (origin, self.weights.sha256), (f"{origin}: tokenizer", self.sha256)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """f32[N, E] with a variance of 1 on average."""
        tokens = tokenize(self.tokenizer, texts, self.model.text_length)
        if tokens.max(initial=0) >= self.model.vocab_size:
            raise UserError(
                f"config.text.tokenizer: token {tokens.max()}, and {self.weights.origin} knows "
                f"{self.model.vocab_size}: take the tokenizer that it was trained with"
            )
        found = np.empty((len(texts), self.width), np.float32)
        for start in range(0, len(texts), BATCH):
            rows = np.minimum(np.arange(start, start + BATCH), len(texts) - 1)
            made = jax.device_get(self._run(self._params, tokens[rows]))
            found[start : start + BATCH] = made[: len(texts) - start]
        return found * np.float32(self.width**0.5)  # of length 1 before

    @cached_property
    def _like(self) -> Any:
        size = self.model.image_size
        key = jax.random.key(0)
        return jax.eval_shape(lambda key: families.initialize(self.model, key, size), key)["params"]

    @cached_property
    def _params(self) -> Any:
        whole = convert.variables_of(self.weights, self.model)["params"]
        kept = {p: x for p, x in paths.flatten(whole).items() if p.startswith(("text/", "logit_"))}
        like = {name: self._like[name] for name in dict.fromkeys(p.split("/")[0] for p in kept)}
        return paths.unflatten(like, kept)

    @cached_property
    def _run(self) -> Any:
        apply = families.make_apply(self.model)
        return jax.jit(
            lambda params, tokens: apply(params, {}, None, tokens, train=False, keys={})[0]["text"]
        )


def read_tower(spec: str, tokenizer: str, *, allow_pickle: bool) -> Tower:
    """A text tower by its weights; no array is read.

    Args:
      spec: a run of config.task image_text, or weights of a SigLIP, as `convert.read_weights` takes
        them.
      tokenizer: a tokenizer.json, or a folder that has one; "" takes that of the folder `spec`.
      allow_pickle: read pickled files too.

    Raises:
      UserError: no such weights, none with a text tower, or no tokenizer.
    """
    state = (state_of(spec), state_of(tokenizer) if tokenizer else ())
    return _read(spec, tokenizer, allow_pickle, state)


@lru_cache(maxsize=2)  # one start asks several times
def _read(spec: str, tokenizer: str, allow_pickle: bool, state: Any) -> Tower:
    del state
    weights = convert.read_weights(spec, allow_pickle=allow_pickle, family="siglip")
    family, arguments = convert.recognize(weights)
    if FAMILIES[family].predicts != "pairs":
        raise UserError(
            f"config.text.tower: {spec} is a {family}, which reads no texts: take a SigLIP, or a "
            "run of config.task image_text"
        )
    place = expand(spec) if "://" not in spec else Path()
    beside = place if place.is_dir() else place.parent
    if not tokenizer and "://" in spec:
        raise UserError(
            f"config.text.tokenizer: name the tokenizer.json or spiece.model of {spec}, which is "
            "not among the weights"
        )
    found = load_tokenizer(tokenizer or str(beside))
    sha256 = hashlib.sha256(found.to_str().encode()).hexdigest()
    return Tower(families.build_model(family, **arguments), weights, found, sha256)
