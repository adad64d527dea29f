"""Published architectures of every family and library under data of other classes, and back."""

import json
import re

import jax
import numpy as np
import pytest
from safetensors.torch import load_file

from vision_jax import convert
from vision_jax.certify import references
from vision_jax.config import load_config
from vision_jax.convert.package import write_package
from vision_jax.convert.tables import ZOO, table_for_export
from vision_jax.errors import UserError
from vision_jax.models import families
from vision_jax.run.description import build_model, describe
from vision_jax.trees import paths

NAMES = ("ant", "bee", "cat")
CONFIGS = {name: f"configs/{name}_finetune.py" for name in ("detr", "rf_detr", "yolox")}
CONFIGS["faster_rcnn"] = "configs/fasterrcnn_finetune.py"
CONFIGS |= dict.fromkeys(("retinanet", "fcos"), "configs/retinanet_finetune.py")
CONFIGS |= dict.fromkeys(("segformer", "deeplab", "eomt", "upernet"), "configs/segment_finetune.py")


def smallest():
    """A small variant of each of the zoo's families, from its libraries by turns."""
    small = re.compile("atto|nano|tiny|small|18|_0?0[24]|400mf|lite0|b0|0.35|035")
    # What is published once and not trained with other classes, and generators.
    fixed = {"NanoDet", "Inception of the FID", "AutoencoderTiny", "AutoencoderKL", "DiT", "SiT"}
    trained = [entry for entry in ZOO if entry.title not in fixed]
    order = sorted(trained, key=lambda entry: (not small.search(entry.name), len(entry.name)))
    found = {}
    for entry in order:
        found.setdefault(entry.title, {}).setdefault(entry.source, entry)
    turns = enumerate(sorted(found))
    return [found[title][sorted(found[title])[turn % len(found[title])]] for turn, title in turns]


def save(reference, folder):
    folder.mkdir()
    return reference.save(folder)


@pytest.mark.parametrize("entry", smallest(), ids=lambda entry: f"{entry.title}-{entry.name}")
def test_other_classes_keep_all_but_the_head_and_go_back(entry, tmp_path):
    reference = references.build_reference(entry)
    spec = save(reference, tmp_path / "source")
    weights = convert.read_weights(spec)
    family, own = convert.recognize(weights)
    fields = {"model.weights": spec, "model.variant": ""}
    if family not in CONFIGS or family == "eomt":
        fields["model.image_size"] = str(entry.image_size)
    if "drop_path" not in families.FAMILIES[family].arguments:
        fields["model.drop_path"] = "0"
    config = load_config(str(CONFIGS.get(family, "configs/transfer.py")), fields)
    description = describe(config, weights, NAMES)
    model = build_model(config, description)
    size = description.preprocessing.image_size if family != "detr" else (64, 64)
    shapes = jax.eval_shape(lambda key: families.initialize(model, key, size), jax.random.key(0))
    target = {path: leaf for tree in shapes.values() for path, leaf in paths.flatten(tree).items()}
    fresh = paths.select(target, config.model.reinitialize, field="")
    head = re.compile(r".*head(_dist|/logits|/deltas)?/(kernel|bias)")
    assert fresh
    assert all(head.fullmatch(path) for path in fresh), fresh

    arguments = convert.arguments_of(model)
    arrays = convert.import_weights(weights, target, arguments, reinitialized=sorted(fresh))
    assert arrays.keys() == target.keys() - fresh
    if own["num_classes"] not in (0, len(NAMES)):
        config.model.reinitialize = ()
        with pytest.raises(UserError, match=f"a head of {own['num_classes']} classes"):
            describe(config, weights, NAMES)

    arrays |= {path: np.full(target[path].shape, 0.5, np.float32) for path in fresh}
    if entry.source == "transformers" and not own["num_classes"] and model_is_unlike(arguments):
        return
    table = table_for_export(entry.source, family, arguments)
    back = references.rebuild(table, family, arguments, arrays, None, tmp_path / "back")  # strictly
    count = len(NAMES) + (family in ("detr", "faster_rcnn"))
    counts = {"faster_rcnn": {count, 4 * count}, "retinanet": {9 * count}}.get(family, {count})
    assert sum(bool(counts & {*p.shape}) for p in back.module.parameters()) >= len(fresh)
    if entry.source in ("timm", "transformers"):
        folder = tmp_path / "named"
        write_package(folder, arrays, family, arguments, to=entry.source, class_names=NAMES)
        said = json.loads((folder / "config.json").read_text())
        names = said.get("label_names") or [said["id2label"][str(i)] for i in range(len(NAMES))]
        assert tuple(names) == NAMES
        written = load_file(folder / "model.safetensors")
        kept = {name: x for name, x in reference.module.state_dict().items() if name in written}
        kept.pop("criterion.empty_weight", None)  # EoMT's loss has a weight for each class
        changed = [name for name, x in kept.items() if x.shape != written[name].shape]
        assert len(changed) <= len(fresh), changed  # a file may name them otherwise than memory


def model_is_unlike(arguments):
    """CLIP's and SigLIP's towers: transformers' classifiers of them pool otherwise."""
    return arguments.get("pre_norm") or arguments.get("pool") == "map"
