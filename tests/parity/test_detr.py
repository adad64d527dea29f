"""Our DETR against transformers' and the original, restated: values, gradients, files both ways."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

from vision_jax import convert
from vision_jax.attacks import gradient
from vision_jax.certify.measure import certify_reference, relative_error
from vision_jax.certify.random_weights import randomize, randomize_statistics, sample_images
from vision_jax.certify.references import load_weights, make_reference, rebuild
from vision_jax.commands.convert import main
from vision_jax.convert.read import Weights
from vision_jax.convert.table import Entry
from vision_jax.convert.tables import find_table, infer_arguments, table_for_export
from vision_jax.errors import UserError
from vision_jax.models.detr import VARIANTS
from vision_jax.models.families import FAMILIES, build_model
from vision_jax.ops.detection_losses import detr_loss
from vision_jax.trees.paths import flatten, unflatten

SIZE = (97, 130)
SMALL = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_queries": 5,
    "num_labels": 3,
}
RESNET = {
    "embedding_size": 8,
    "hidden_sizes": [16, 16, 32, 32],
    "depths": [1, 2, 1, 1],
    "out_features": ["stage4"],
}
ORIGINAL = {
    "backbone": "resnet18",
    "hidden_dim": 32,
    "dim_feedforward": 48,
    "enc_layers": 1,
    "dec_layers": 2,
    "num_queries": 5,
    "num_classes": 3,
}
DETECTOR = "DetrForObjectDetection"


def own_backbone():
    return {**SMALL, "backbone_config": transformers.ResNetConfig(**RESNET)}


REFERENCES = {
    "transformers, R50's shape": ("transformers", DETECTOR, own_backbone),
    "transformers, timm's DC5": (
        "transformers",
        DETECTOR,
        lambda: {**SMALL, "backbone": "resnet18", "dilation": True},
    ),
    "original": ("detr", "DETR", lambda: ORIGINAL),
}


def reference_of(name, **more):
    source, build, arguments = REFERENCES[name]
    reference = make_reference(source, build, {**arguments(), **more})
    randomize(reference.module, 3)
    randomize_statistics(reference, SIZE, 3, 3)
    return reference


def test_everything_equals_the_reference_and_goes_back():
    """Among padding, of two sizes, in two precisions, and after an export that loads strictly."""
    entry = Entry("transformers/small", "DETR", DETECTOR)
    certificate = certify_reference(
        reference_of("transformers, R50's shape"), SIZE, of_entry=entry, whole=True
    )
    print(certificate["worst"])
    assert certificate["pass"], (certificate["reasons"], certificate["errors"])
    assert certificate["family"] == "detr"
    assert certificate["parameters_filled"] == certificate["parameters_in_model"]
    assert certificate["tensors_consumed"] == certificate["tensors"]
    assert certificate["preprocessing"]["largest_difference_in_255ths"] == 0
    assert certificate["preprocessing"]["square"] is False
    layers = {"encoder_0", "decoder_0", "decoder_1", "input_proj", "stem"}
    stages = {f"stage_{i}" for i in range(4)}
    outputs = {"logits", "boxes_cxcywh_01"}
    assert set(certificate["errors"]["float64"]) == layers | stages | outputs


@pytest.mark.parametrize("name", list(REFERENCES)[:2])
def test_an_unequal_encoder_and_decoder(name):
    """In layers, heads and hidden widths."""
    reference = reference_of(name, encoder_layers=2, decoder_attention_heads=8, decoder_ffn_dim=40)
    certificate = certify_reference(reference, SIZE, whole=True)
    assert certificate["pass"], (certificate["reasons"], certificate["errors"])
    sizes = ("num_heads", "decoder_heads", "mlp_width", "decoder_mlp_width", "encoder_depth")
    assert [certificate["arguments"][size] for size in sizes] == [4, 8, 48, 40, 2]


def imported(spec, dtype=jnp.float64, **changed):
    """(model, variables) of weights."""
    weights = convert.read_weights(str(spec), allow_pickle=True)
    family, arguments = convert.recognize(weights)
    model = build_model(family, **{**arguments, **changed}, dtype=dtype)
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *SIZE, 3)))
    target = {path: x for tree in like.values() for path, x in flatten(tree).items()}
    flat = convert.import_weights(weights, target, arguments)
    cast = {path: jnp.asarray(x, dtype if x.ndim else None) for path, x in flat.items()}
    parts = {name: {path: cast[path] for path in flatten(tree)} for name, tree in like.items()}
    return model, {name: unflatten(like[name], part) for name, part in parts.items()}


def padded_batch():
    """(images f64 in [0, 1], pixel mask): three sizes on one canvas."""
    images, mask = sample_images(3, SIZE, 3, 4), np.zeros((3, *SIZE), bool)
    for index, (height, width) in enumerate((SIZE, (64, 111), (90, 33))):
        mask[index, :height, :width] = True
    return images, mask


def normalized(images, model):
    return (images - np.asarray(model.mean)) / np.asarray(model.std)


def test_all_layers_and_gradients_equal_the_original(tmp_path):
    """Of a padded batch, for every parameter, statistics aside; in float64."""
    reference = reference_of("original")
    images, mask = padded_batch()
    with jax.enable_x64(True):
        model, variables = imported(reference.save(tmp_path), mask_padding=False)
        rng = np.random.default_rng(0)
        outputs = jax.eval_shape(model.apply, variables, jnp.asarray(images), jnp.asarray(mask))
        probes = {name: rng.normal(size=x.shape) for name, x in outputs.items()}

        def loss(params):
            found = model.apply({**variables, "params": params}, images, mask)
            return sum((found[name] * probe).sum() for name, probe in probes.items()), found

        gradients, found = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
        gradients = {path: np.asarray(x) for path, x in flatten(gradients).items()}
    module = reference.module.double()
    given = torch.from_numpy(normalized(images, model) * mask[..., None]).permute(0, 3, 1, 2)
    result = module(given, pixel_mask=torch.from_numpy(mask))
    layers = [*result.auxiliary, (result.logits, result.pred_boxes)]
    total = 0
    for index, name in enumerate(("logits", "boxes_cxcywh_01")):
        theirs = torch.stack([layer[index] for layer in layers])
        assert relative_error(np.asarray(found[name]), theirs.detach().numpy()) <= 1e-13, name
        total = total + (theirs * torch.from_numpy(probes[name])).sum()
    total.backward()
    theirs = {name: p.grad.numpy() for name, p in module.named_parameters() if p.grad is not None}
    arguments = convert.arguments_of(model)
    seen = 0
    for rule in table_for_export("detr", "detr", arguments).rules(arguments):
        if not all(name in theirs for name in rule.names):
            continue  # a frozen norm's
        expected = rule.layout.to_tree([theirs[name] for name in rule.names])
        for path, value in zip(rule.paths, expected, strict=True):
            if np.abs(value).max() > 1e-9:  # the first queries all see the same: rounding alone
                assert relative_error(gradients[path], value) <= 1e-10, path
                seen += 1
    assert seen > 80


@pytest.mark.parametrize("name", ["transformers, R50's shape", "transformers, timm's DC5"])
def test_a_padded_batch_is_the_references_or_that_of_each_image_alone(name, tmp_path):
    reference = reference_of(name)
    images, mask = padded_batch()
    reference.save(tmp_path)
    with jax.enable_x64(True):
        model, variables = imported(tmp_path)
        ours, theirs_way = (
            {
                name: np.asarray(x[-1])
                for name, x in jax.jit(form.apply)(variables, images, mask).items()
            }
            for form in (model, dataclasses.replace(model, mask_padding=False))
        )
    padded = reference.outputs(normalized(images, model) * mask[..., None], pixel_mask=mask)
    for output, value in theirs_way.items():
        assert relative_error(value, padded[output]) <= 1e-12, output
    for index in range(3):
        height, width = mask[index, :, 0].sum(), mask[index, 0].sum()
        alone = normalized(images[index : index + 1, :height, :width], model)
        theirs = reference.outputs(alone)
        for name, value in ours.items():
            assert relative_error(value[index : index + 1], theirs[name]) <= 1e-12, (name, index)
    assert relative_error(ours["logits"], padded["logits"]) > 1e-3


@pytest.mark.parametrize("name", ["transformers, R50's shape", "transformers, timm's DC5"])
def test_names_in_memory_and_stray_counts(name, tmp_path):
    """torch.save(model.state_dict()) has other names than the model's files."""
    reference = reference_of(name)
    reference.save(tmp_path / "files")
    (tmp_path / "memory").mkdir()
    state = reference.module.state_dict()
    stray = next(key for key in state if key.endswith("running_var"))
    state[stray.replace("running_var", "num_batches_tracked")] = torch.tensor(7)
    torch.save(state, tmp_path / "memory" / "pytorch_model.bin")
    config = (tmp_path / "files" / "config.json").read_text()
    (tmp_path / "memory" / "config.json").write_text(config)
    with jax.enable_x64(True):
        (model, first), (again, second) = (
            imported(tmp_path / part) for part in ("files", "memory")
        )
    assert model == again
    first, second = flatten(first), flatten(second)
    counts = {path for path in first if path.endswith("/count")}
    assert sum(int(second[path]) for path in counts) == 7
    for path in set(first) - counts:
        np.testing.assert_array_equal(second[path], first[path], path)


def test_an_original_checkpoint_goes_to_transformers_and_back(tmp_path, capsys):
    """By the command line, with the very tensors at the end, and the same boxes in between."""
    reference = reference_of("original")
    state = {name: x.clone() for name, x in reference.module.state_dict().items()}
    torch.save({"model": state, "epoch": 3}, tmp_path / "detr.pth")
    there = [str(tmp_path / "detr.pth"), "--allow-pickle", f"--out={tmp_path / 'hub'}"]
    assert main(there) == 0  # to transformers, since timm has none
    assert f"{len(state)} tensors consumed" in capsys.readouterr().out
    module, report = transformers.DetrForObjectDetection.from_pretrained(
        tmp_path / "hub", output_loading_info=True
    )
    assert not any(report.values()), report
    images, mask = padded_batch()
    given = images.astype(np.float32)
    theirs = reference.outputs(given * mask[..., None], pixel_mask=mask)
    hub = type(reference)("transformers", module.eval(), DETECTOR, {})
    found = hub.outputs(given * mask[..., None], pixel_mask=mask)
    model, variables = imported(
        tmp_path / "detr.pth", jnp.float32, mask_padding=False, mean=(0.0,) * 3, std=(1.0,) * 3
    )
    ours = jax.jit(model.apply)(variables, jnp.asarray(given), jnp.asarray(mask))
    for name, value in theirs.items():
        assert relative_error(found[name], value) <= 1e-5, name
        assert relative_error(np.asarray(ours[name][-1]), value) <= 1e-5, name
    assert main([str(tmp_path / "hub"), f"--out={tmp_path / 'back'}", "--to=detr"]) == 0
    other = make_reference("detr", "DETR", ORIGINAL)
    load_weights(other, tmp_path / "back" / "model.safetensors")
    for name, value in other.module.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_classes_and_preprocessing_travel(tmp_path):
    names = {0: "N/A", 1: "person", 2: "kite"}
    reference = reference_of("transformers, R50's shape", id2label=names)
    reference.save(tmp_path / "hub")
    sides = {"shortest_edge": 480, "longest_edge": 640}
    transformers.DetrImageProcessor(size=sides).save_pretrained(tmp_path / "hub")
    weights = convert.read_weights(str(tmp_path / "hub"))
    assert convert.class_names_of(weights) == list(names.values())
    assert (weights.preprocessing["short"], weights.preprocessing["longest"]) == (480, 640)
    assert weights.preprocessing["interpolation"] == "bilinear"
    assert main([str(tmp_path / "hub"), f"--out={tmp_path / 'out'}"]) == 0
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert dict(processor.size) == sides
    assert "Detr" in type(processor).__name__
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.id2label == names
    again = convert.read_weights(str(tmp_path / "out"))
    for name in ("short", "longest", "mean", "std", "interpolation"):
        assert again.preprocessing[name] == weights.preprocessing[name], name
    # As the files of 2021 say it.
    old = {"size": 480, "max_size": 640, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "hub" / "preprocessor_config.json").write_text(json.dumps(old))
    found = convert.read_weights(str(tmp_path / "hub")).preprocessing
    assert (found["short"], found["longest"], found["mean"]) == (480, 640, (0.5,) * 3)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("source", ["transformers", "detr"])
def test_named_variants_are_the_published_ones(name, source):
    """Every name and shape of the whole models, from shapes alone."""
    given = {"backbone": name.split("_")[1], "dilation": name.endswith("dc5")}
    build, classes = (
        (DETECTOR, "num_labels") if source == "transformers" else ("DETR", "num_classes")
    )
    with torch.device("meta"):
        module = make_reference(source, build, {**given, classes: 91}).module
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    config = {"config": given}
    table = find_table(shapes)
    full = {**FAMILIES["detr"].defaults, **infer_arguments(table, shapes, config)}
    assert full == {**full, "num_classes": 91, **VARIANTS[name]}
    names = {n for rule in table.rules(full) if rule.written for n in rule.names}
    assert names == set(shapes)
    if source == "detr":
        assert sum(p.numel() for p in module.parameters()) in (41_524_768, 60_464_672)
    exporting = table_for_export(source, "detr", full)
    written = {n for rule in exporting.rules(full) if rule.written for n in rule.names}
    assert len(written) == len(shapes)
    if source == "transformers" and "50" in name:
        assert len(written) == 530  # as in the hub's files


def test_an_unusual_one_goes_where_it_can(tmp_path):
    arguments = {**FAMILIES["detr"].defaults, "num_classes": 2, "depths": (1, 1, 1, 1)}
    assert table_for_export("transformers", "detr", arguments).kind == "its own backbone"
    with pytest.raises(UserError, match="detr has no detr that is such a model"):
        table_for_export("detr", "detr", arguments)
    with pytest.raises(UserError, match="nor has any other library"):
        table_for_export("transformers", "detr", {**arguments, "dilation": True})
    # But a run's own file holds it, and says so in its header.
    dilated = {**arguments, "dilation": True}
    tensors, header = convert.export_weights({}, "detr", dilated, to=convert.own_naming("detr"))
    assert tensors == {}
    assert json.loads(header["vision_jax"])["arguments"]["dilation"] is True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_embedding_type": "learned"}, "position_embedding_type 'learned'"),
        ({"activation_function": "gelu"}, "activation_function 'gelu' is not supported"),
        ({"model_type": "conditional_detr"}, "model_type 'conditional_detr'"),
        ({"auxiliary_loss": True}, "auxiliary_loss true"),
        ({"backbone_config": {"downsample_in_bottleneck": True}}, "stride_first True"),
    ],
)
def test_its_relatives_are_refused(change, message, tmp_path):
    reference = make_reference("transformers", DETECTOR, own_backbone())
    reference.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    shapes = convert.read_weights(str(tmp_path)).tensors
    with pytest.raises(UserError, match=message):
        convert.recognize(Weights(shapes, {"config": config}, None, "here", ""))


def test_a_rebuilt_reference_is_strict(tmp_path):
    """A tensor that transformers misses is found out: the certificate's strictness is real."""
    reference = reference_of("transformers, R50's shape")
    weights = convert.read_weights(reference.save(tmp_path / "source"))
    family, arguments = convert.recognize(weights)
    model = build_model(family, **arguments)
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *SIZE, 3)))
    target = {path: x for tree in like.values() for path, x in flatten(tree).items()}
    flat = convert.import_weights(weights, target, arguments)
    del flat["class_head/bias"]
    table = table_for_export("transformers", family, arguments)
    with pytest.raises(RuntimeError, match="missing"):
        rebuild(table, family, arguments, flat, None, tmp_path / "back")


@pytest.mark.parametrize(
    ("attack", "norm", "alone"), [("pgd", "linf", True), ("fgsm", "l2", False)]
)
def test_attacks_climb_as_on_the_reference(attack, norm, alone, tmp_path, rng):
    """From the same start, on a padded batch, in float64: the steps are those of its set loss.

    `alone`, each image is a batch of its own there.
    """
    reference = reference_of("transformers, R50's shape")
    reference.save(tmp_path)
    images, mask = padded_batch()
    images[~mask] = 0.7  # what stands in the padding must not matter and not move
    counts = (2, 0, 4)
    label = rng.integers(0, 3, (3, 5))
    boxes = np.concatenate([rng.uniform(0.3, 0.7, (3, 5, 2)), rng.uniform(0.1, 0.5, (3, 5, 2))], -1)
    real = np.arange(5) < np.array(counts)[:, None]
    epsilon, step_size, steps = {"pgd": (0.03, 0.012, 4), "fgsm": (0.8, 0.8, 1)}[attack]
    start = images
    if attack == "pgd":
        start = np.clip(images + rng.uniform(-0.005, 0.005, images.shape) * mask[..., None], 0, 1)

    with jax.enable_x64(True):
        model, variables = imported(tmp_path, mask_padding=False)

        def loss_of_images(images):
            found = model.apply(variables, images, jnp.asarray(mask))
            losses, _ = detr_loss(
                found["logits"], found["boxes_cxcywh_01"], label, boxes, real, np.ones(3, bool),
                no_object_weight=0.3, alone=alone,
            )  # fmt: skip
            return losses, jnp.zeros(3, bool)

        limits = {"norm": norm, "epsilon": epsilon, "pixel_mask": jnp.asarray(mask)[..., None]}
        climbed = functools.partial(gradient.fgsm, loss_of_images, **limits)
        if attack == "pgd":
            own = {"step_size": step_size, "steps": steps, "start": jnp.asarray(start)}
            climbed = functools.partial(gradient.pgd, loss_of_images, keys=None, **own, **limits)
        ours = np.asarray(jax.jit(climbed)(images=jnp.asarray(images)))

    module = reference.module.double()
    states: list[torch.Tensor] = []
    for layer in module.model.decoder.layers:
        layer.register_forward_hook(lambda module, inputs, output: states.append(output))
    settings = transformers.DetrConfig(eos_coefficient=0.3, num_labels=3, auxiliary_loss=True)
    mean, std = (torch.tensor(x, dtype=torch.float64) for x in (model.mean, model.std))
    pixel_mask = torch.from_numpy(mask)
    targets = [
        {"class_labels": torch.from_numpy(k[m]), "boxes": torch.from_numpy(b[m])}
        for k, b, m in zip(label, boxes, real, strict=True)
    ]

    def uphill(at):
        at = at.clone().requires_grad_()
        given = ((at - mean) / std * pixel_mask[..., None]).permute(0, 3, 1, 2)
        for rows in [[0], [1], [2]] if alone else [[0, 1, 2]]:
            states.clear()
            module(given[rows], pixel_mask=pixel_mask[rows])
            # Its own auxiliary outputs are of another network, whose layers see normalized states.
            hidden = module.model.decoder.layernorm(torch.stack(states))
            logits = module.class_labels_classifier(hidden)
            found = module.bbox_predictor(hidden).sigmoid()
            torch.set_default_dtype(torch.float64)  # of the class weights that the loss makes
            loss, _, _ = ForObjectDetectionLoss(
                logits[-1],
                [targets[row] for row in rows],
                "cpu",
                found[-1],
                settings,
                logits,
                found,
            )
            torch.set_default_dtype(torch.float32)
            loss.backward(retain_graph=True)
        return at.grad

    def length(x):
        return x.square().sum((1, 2, 3), keepdim=True).sqrt()

    clean, at = torch.from_numpy(images), torch.from_numpy(start)
    for _ in range(steps):
        up = uphill(at)
        if norm == "linf":
            change = (at + step_size * up.sign() - clean).clamp(-epsilon, epsilon)
        else:
            change = at + step_size * up / length(up) - clean
            change = change * (epsilon / length(change)).clamp(max=1)
        at = (clean + change).clamp(0, 1)
    np.testing.assert_allclose(ours, at.numpy(), rtol=0, atol=1e-10)
    assert np.abs(ours - images).max() > 0.002
    np.testing.assert_array_equal(ours[~mask], images[~mask])
