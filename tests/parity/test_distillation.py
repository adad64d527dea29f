"""Distillation losses and gradients against timm and the papers' code, stated anew in torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm.task
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from timm.task.token_distillation import TokenDistillationTask
from torch import nn
from torchvision.ops import box_convert, box_iou, generalized_box_iou

from vision_jax.ops import distillation

EXAMPLES, CLASSES = 6, 7
LABEL = np.random.default_rng(0).integers(0, CLASSES, EXAMPLES)


def random(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return 2 * rng.normal(size=shape)


def random_boxes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    sides = rng.uniform(0.05, 0.4, (*shape, 2))
    return np.concatenate([rng.uniform(0.2, 0.8, (*shape, 2)), sides], axis=-1)


def probabilities(rng: np.random.Generator, *shape: int) -> np.ndarray:
    exponentials = np.exp(random(rng, *shape))
    return exponentials / exponentials.sum(-1, keepdims=True)


def check(function, reference, students, teachers):
    """Mean loss and gradients in float64 to 1e-12 of the largest value, none for the teacher."""
    tensors = [torch.tensor(x, requires_grad=True) for x in students]
    expected = reference(*tensors, *(torch.tensor(x) for x in teachers))
    expected.backward()
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x) for x in (*students, *teachers)]

        def mean(*arrays):
            losses = function(*arrays)
            return losses.mean(), losses

        step = jax.jit(jax.value_and_grad(mean, tuple(range(len(arrays))), has_aux=True))
        (loss, losses), gradients = step(*arrays)
    assert losses.shape == (EXAMPLES,)
    assert losses.dtype == np.float64
    assert abs(float(loss) - expected.item()) <= 1e-12 * max(abs(expected.item()), 1)
    for result, tensor in zip(gradients, tensors, strict=False):
        largest = tensor.grad.abs().max().item()
        assert largest > 0
        np.testing.assert_allclose(result, tensor.grad.numpy(), rtol=0, atol=1e-12 * largest)
    for result in gradients[len(tensors) :]:
        assert not result.any()


# timm ---------------------------------------------------------------------------------------------


class Given(nn.Module):
    """A model whose outputs are given; what timm's tasks ask of one and no more."""

    def __init__(self, *outputs: torch.Tensor, features: torch.Tensor | None = None):
        super().__init__()
        self.outputs, self.features = outputs, features
        self.num_classes, self.in_chans = CLASSES, 3
        self.num_features = 3 if features is None else features.shape[-1]
        self.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
        self.unused = nn.Parameter(torch.zeros(()))

    def set_distilled_training(self, enable: bool) -> None:
        self.distilled = enable

    def forward(self, images: torch.Tensor):
        return self.outputs if len(self.outputs) > 1 else self.outputs[0]

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        return self.features

    def forward_head(self, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return features if pre_logits else self.outputs[0]


def timm_loss(task, student: Given, teacher: Given, **settings) -> torch.Tensor:
    images = torch.zeros(EXAMPLES, 3, 2, 2, dtype=torch.float64)
    task = task(
        student, teacher, nn.CrossEntropyLoss(), verbose=False, dtype=torch.float64, **settings
    )
    return task(images, torch.tensor(LABEL))["loss"]


@pytest.mark.parametrize("temperature", [1.0, 3.5])
def test_soft_logits_equal_timm(temperature, rng):
    def reference(logits, teacher_logits):
        return timm_loss(
            timm.task.LogitDistillationTask, Given(logits), Given(teacher_logits),
            temperature=temperature, task_loss_weight=0.0, distill_loss_weight=1.0,
        )  # fmt: skip

    check(
        lambda *logits: distillation.soft_logits(*logits, temperature),
        reference,
        [random(rng, EXAMPLES, CLASSES)],
        [random(rng, EXAMPLES, CLASSES)],
    )


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_token_equals_timm(kind, rng):
    def reference(logits, token_logits, teacher_logits):
        return timm_loss(
            TokenDistillationTask, Given(logits, token_logits), Given(teacher_logits),
            distill_type=kind, temperature=3.0, task_loss_weight=0.7,
        )  # fmt: skip

    def ours(logits, token_logits, teacher_logits):
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), LABEL[:, None], 1)[:, 0]
        return distillation.token(
            losses, token_logits, teacher_logits, kind=kind, weight=0.3, temperature=3.0
        )

    check(
        ours,
        reference,
        [random(rng, EXAMPLES, CLASSES), random(rng, EXAMPLES, CLASSES)],
        [random(rng, EXAMPLES, CLASSES)],
    )


def test_hint_equals_timm(rng):
    def reference(features, teacher_features):
        logits = torch.zeros(EXAMPLES, CLASSES, dtype=torch.float64)
        return timm_loss(
            timm.task.FeatureDistillationTask,
            Given(logits, features=features),
            Given(logits, features=teacher_features),
            task_loss_weight=0.0,
            distill_loss_weight=1.0,
        )

    check(distillation.hint, reference, [random(rng, EXAMPLES, 5)], [random(rng, EXAMPLES, 5)])


# Papers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_hard_label(smoothing, rng):
    check(
        lambda *logits: distillation.hard_label(*logits, smoothing),
        lambda s, t: F.cross_entropy(s, t.argmax(-1), label_smoothing=smoothing),
        [random(rng, EXAMPLES, CLASSES)],
        [random(rng, EXAMPLES, CLASSES)],
    )


def test_decoupled(rng):
    alpha, beta, temperature = 1.5, 6.0, 3.0
    one_hot = F.one_hot(torch.tensor(LABEL), CLASSES).double()

    def reference(logits, teacher_logits):
        def pair(logits):
            probability = F.softmax(logits / temperature, dim=1)
            target = (probability * one_hot).sum(1, keepdim=True)
            return torch.cat([target, (probability * (1 - one_hot)).sum(1, keepdim=True)], dim=1)

        target = F.kl_div(pair(logits).log(), pair(teacher_logits), reduction="batchmean")
        without = [x / temperature - 1000.0 * one_hot for x in (logits, teacher_logits)]
        other = F.kl_div(
            F.log_softmax(without[0], dim=1), F.softmax(without[1], dim=1), reduction="batchmean"
        )
        return (alpha * target + beta * other) * temperature**2

    check(
        lambda *logits: distillation.decoupled(
            *logits, jnp.asarray(LABEL), target_weight=alpha, other_weight=beta,
            temperature=temperature,
        ),
        reference,
        [random(rng, EXAMPLES, CLASSES)],
        [random(rng, EXAMPLES, CLASSES)],
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(3,), (3, EXAMPLES)])
def test_several_teachers(shape, rng):
    weights, temperature = rng.uniform(0.1, 2, shape), 2.0

    def reference(logits, teacher_logits):
        share = torch.tensor(weights / weights.sum(0)).reshape(*shape, *(1,) * (3 - len(shape)))
        mean = (share * F.softmax(teacher_logits / temperature, dim=-1)).sum(0)
        student = F.log_softmax(logits / temperature, dim=-1)
        return F.kl_div(student, mean, reduction="batchmean") * temperature**2

    def ours(logits, teacher_logits):
        together = distillation.ensemble_logits(teacher_logits, weights, temperature)
        return distillation.soft_logits(logits, together, temperature)

    check(ours, reference, [random(rng, EXAMPLES, CLASSES)], [random(rng, 3, EXAMPLES, CLASSES)])


@pytest.mark.parametrize("power", [2, 3])
def test_attention_transfer(power, rng):
    def reference(features, teacher_features):
        def at(x):  # NCHW, as the authors'
            x = x.permute(0, 3, 1, 2)
            return F.normalize(x.abs().pow(power).mean(1).flatten(1))

        return (at(features) - at(teacher_features)).pow(2).mean()

    check(
        lambda *features: distillation.attention_transfer(*features, power),
        reference,
        [random(rng, EXAMPLES, 4, 3, 5)],
        [random(rng, EXAMPLES, 4, 3, 8)],
    )


@pytest.mark.parametrize("heads", [2, 3])
@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_attention_maps(kind, heads, rng):
    def reference(attention, teacher):
        if heads != 2:
            attention, teacher = attention.mean(1), teacher.mean(1)
        if kind == "mse":
            return F.mse_loss(attention, teacher)
        return F.kl_div(attention.log(), teacher, reduction="none").sum(-1).mean()

    teacher = probabilities(rng, EXAMPLES, heads, 4, 5)
    teacher[:, :, 0] = np.eye(5)[2]  # certain of one key
    check(
        lambda *attentions: distillation.attention_maps(*attentions, kind),
        reference,
        [probabilities(rng, EXAMPLES, 2, 4, 5)],
        [teacher],
    )


def test_patch_tokens(rng):
    check(
        distillation.patch_tokens,
        lambda s, t: (1 - F.cosine_similarity(s, t, dim=-1)).mean(),
        [random(rng, EXAMPLES, 4, 5)],
        [random(rng, EXAMPLES, 4, 5)],
    )
    check(
        lambda *tokens: distillation.patch_tokens(*tokens, "mse"),
        F.mse_loss,
        [random(rng, EXAMPLES, 4, 5)],
        [random(rng, EXAMPLES, 4, 5)],
    )


def test_relational_distance(rng):
    def distances(features):
        squares = features.pow(2).sum(1)
        products = features @ features.t()
        squared = (squares[:, None] + squares[None] - 2 * products).clamp(min=1e-12)
        distance = squared.sqrt() * (1 - torch.eye(EXAMPLES, dtype=torch.float64))
        return distance / distance[distance > 0].mean()

    check(
        distillation.relational_distance,
        lambda s, t: F.smooth_l1_loss(distances(s), distances(t)),
        [random(rng, EXAMPLES, 5)],
        [random(rng, EXAMPLES, 8)],
    )


def test_relational_angle(rng):
    def angles(features):
        direction = F.normalize(features.unsqueeze(0) - features.unsqueeze(1), p=2, dim=2)
        return torch.bmm(direction, direction.transpose(1, 2)).flatten()

    check(
        distillation.relational_angle,
        lambda s, t: F.smooth_l1_loss(angles(s), angles(t)),
        [random(rng, EXAMPLES, 5)],
        [random(rng, EXAMPLES, 8)],
    )


@pytest.mark.parametrize("size", [(3, 5), (9, 4), (4, 6), (1, 1)])
def test_other_grids_are_interpolated_as_in_torch(size, rng):
    def reference(tokens, teacher_map):
        grid = tokens[:, 2:].permute(0, 2, 1).reshape(EXAMPLES, 5, 4, 6)
        grid = F.interpolate(grid, size=size, mode="bilinear", align_corners=False)
        return F.mse_loss(grid, teacher_map.permute(0, 3, 1, 2))

    def ours(tokens, teacher_map):
        return distillation.hint(
            distillation.to_grid(tokens, size, grid=(4, 6), num_prefix=2), teacher_map
        )

    check(ours, reference, [random(rng, EXAMPLES, 2 + 24, 5)], [random(rng, EXAMPLES, *size, 5)])


# Detectors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("queries", "teacher_queries", "most", "sigmoid"),
    [(8, 5, 100, False), (5, 8, 100, True), (5, 8, 3, False), (8, 5, 3, True)],
)
def test_detr_queries(queries, teacher_queries, most, sigmoid, rng):
    temperature = 1.5
    costs = {"class_cost": 1.5, "l1_cost": 4.0, "giou_cost": 2.5}
    weights = {"class_weight": 1.25, "l1_weight": 3.0, "giou_weight": 1.75}

    def xyxy(boxes):
        return box_convert(boxes, "cxcywh", "xyxy")

    def divergence(student, teacher):
        student, teacher = student / temperature, teacher / temperature
        if not sigmoid:
            return F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="none").sum(-1)
        pairs = [torch.stack([x.sigmoid(), (-x).sigmoid()]) for x in (student, teacher)]
        return F.kl_div(pairs[0].log(), pairs[1], reduction="none").sum((0, -1))

    def reference(logits, boxes, teacher_logits, teacher_boxes):
        losses = []
        for s, sb, t, tb in zip(logits, boxes, teacher_logits, teacher_boxes, strict=True):
            p, q = (x.sigmoid() if sigmoid else x.softmax(-1) for x in (s, t))
            confidence = (q if sigmoid else q[:, :-1]).amax(-1)
            best = confidence.argsort(descending=True)[: min(most, queries)]
            confidence, q, t, tb = confidence[best], q[best], t[best], tb[best]
            cost = costs["l1_cost"] * torch.cdist(tb, sb, p=1)
            cost = cost - costs["giou_cost"] * generalized_box_iou(xyxy(tb), xyxy(sb))
            cost = cost - costs["class_cost"] * q @ p.T
            rows, columns = linear_sum_assignment(cost.detach().numpy())
            s, sb, t, tb, w = s[columns], sb[columns], t[rows], tb[rows], confidence[rows]
            loss = weights["class_weight"] * temperature**2 * divergence(s, t)
            loss = loss + weights["l1_weight"] * F.l1_loss(sb, tb, reduction="none").sum(-1)
            giou = generalized_box_iou(xyxy(sb), xyxy(tb)).diagonal()
            loss = loss + weights["giou_weight"] * (1 - giou)
            losses.append((w * loss).sum() / w.sum())
        return torch.stack(losses).mean()

    def ours(*arrays):
        return distillation.detr_queries(
            *arrays,
            sigmoid=sigmoid,
            most_queries=most,
            temperature=temperature,
            **costs,
            **weights,
        )

    check(
        ours,
        reference,
        [random(rng, EXAMPLES, queries, CLASSES), random_boxes(rng, EXAMPLES, queries)],
        [
            random(rng, EXAMPLES, teacher_queries, CLASSES),
            random_boxes(rng, EXAMPLES, teacher_queries),
        ],
    )


# A YOLOX student ----------------------------------------------------------------------------------

CANVAS, STRIDES = (32, 64), (8, 16, 32)


def places() -> tuple[torch.Tensor, torch.Tensor]:
    """Column and row of each cell [A, 2], and its stride [A, 1]."""
    found = [
        (column, row, stride)
        for stride in STRIDES
        for row in range(CANVAS[0] // stride)
        for column in range(CANVAS[1] // stride)
    ]
    table = torch.tensor(found, dtype=torch.float64)
    return table[:, :2], table[:, 2:]


def decoded(deltas: torch.Tensor) -> torch.Tensor:
    """Corners [..., A, 4]."""
    cells, stride = places()
    center, sides = (deltas[..., :2] + cells) * stride, deltas[..., 2:].exp() * stride
    return torch.cat([center - sides / 2, center + sides / 2], -1)


def simota(logits, objects, boxes, label, targets) -> dict[int, int]:
    """The target of each cell that has one, of one image; boxes and targets are corners."""
    cells, stride = places()
    centers = (cells + 0.5) * stride
    middle = (targets[:, :2] + targets[:, 2:]) / 2
    near = (centers[None] - middle[:, None]).abs().amax(-1) < 1.5 * stride[:, 0]
    part = near.any(0)
    iou = torch.where(part, box_iou(targets, boxes), 0)
    chance = (logits.sigmoid() * objects.sigmoid()[:, None]).sqrt()
    cost = torch.full(iou.shape, torch.inf, dtype=torch.float64)
    for t in range(len(targets)):
        wanted = F.one_hot(label[t], CLASSES).to(chance).expand_as(chance)
        bce = F.binary_cross_entropy(chance, wanted, reduction="none").sum(-1)
        far = torch.where(near[t], 0, 1e6)
        cost[t, part] = (bce - 3 * (iou[t] + 1e-8).log() + far)[part]
    claims: dict[int, list[int]] = {}
    for t in range(len(targets)):
        count = max(int(iou[t].topk(10).values.sum()), 1)
        for cell in cost[t].topk(count, largest=False).indices.tolist():
            claims.setdefault(cell, []).append(t)
    return {
        cell: owners[0] if len(owners) == 1 else int(cost[:, cell].argmin())
        for cell, owners in claims.items()
        if cost[owners, cell].min() < torch.inf
    }


def cells_of(rng: np.random.Generator) -> list[np.ndarray]:
    """Logits, object logits and deltas of a random YOLOX; boxes of some 16 pixels."""
    count = len(places()[0])
    deltas = 0.3 * rng.normal(size=(EXAMPLES, count, 4))
    deltas[..., 2:] += np.log(16 / places()[1].numpy())
    deltas[..., :2] += 0.5
    return [random(rng, EXAMPLES, count, CLASSES), random(rng, EXAMPLES, count), deltas]


def test_yolox_detections(rng):
    """Of boxes some are too unsure, some have no area, and an image may have none."""
    corner = rng.uniform([0, 0], [44, 16], (EXAMPLES, 5, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(8, 20, (EXAMPLES, 5, 2))], -1)
    boxes[0, 1, 2:] = boxes[0, 1, :2]
    score = rng.uniform(0.3, 1, (EXAMPLES, 5))
    score[:, 3], score[1] = 0.2, 0
    label = rng.integers(0, CLASSES, (EXAMPLES, 5))

    def function(logits, objects, deltas, score, boxes):
        return distillation.yolox_detections(
            logits,
            objects,
            deltas,
            score,
            jnp.asarray(label),
            boxes,
            jnp.ones(EXAMPLES, bool),
            canvas=CANVAS,
            strides=STRIDES,
            least_score=0.25,
        )

    def reference(logits, objects, deltas, score, boxes):
        total, cells = torch.zeros((), dtype=torch.float64), 0
        for image in range(EXAMPLES):
            area = (boxes[image, :, 2:] > boxes[image, :, :2]).all(-1)
            kept = [t for t in range(5) if score[image, t] >= 0.25 and area[t]]
            own, sure = decoded(deltas[image]), torch.zeros(objects.shape[1], dtype=torch.float64)
            classes, targets = torch.tensor(label[image, kept]), boxes[image, kept]
            with torch.no_grad():
                given = (logits[image], objects[image], own, classes, targets)
                owner = simota(*given) if kept else {}
            cells += len(owner)
            for cell, t in owner.items():
                sure[cell] = weight = score[image, kept[t]].item()
                iou = box_iou(own[cell][None], targets[t][None])[0, 0]
                wanted = torch.zeros(CLASSES, dtype=torch.float64)
                wanted[classes[t]] = iou.detach()
                bce = F.binary_cross_entropy_with_logits(
                    logits[image, cell], wanted, reduction="sum"
                )
                total = total + weight * (5 * (1 - iou**2) + bce)
            total = total + F.binary_cross_entropy_with_logits(
                objects[image], sure, reduction="sum"
            )
        assert cells > 2 * EXAMPLES
        return total / EXAMPLES

    check(function, reference, cells_of(rng), [score, boxes])


@pytest.mark.long
def test_yolox_cells(rng):
    def function(*arrays):
        return distillation.yolox_cells(
            *arrays, jnp.ones(EXAMPLES, bool), canvas=CANVAS, strides=STRIDES, temperature=2.0
        )

    def reference(logits, objects, deltas, *teacher):
        teacher_logits, teacher_objects, teacher_deltas = teacher

        def divergence(said, told):
            bernoulli = (torch.distributions.Bernoulli(logits=x / 2) for x in (told, said))
            return 4 * torch.distributions.kl_divergence(*bernoulli)

        own, theirs = (decoded(x).reshape(-1, 4) for x in (deltas, teacher_deltas))
        iou = box_iou(own, theirs).diagonal().reshape(objects.shape)
        weighted = divergence(logits, teacher_logits).sum(-1) + 5 * (1 - iou**2)
        losses = divergence(objects, teacher_objects) + teacher_objects.sigmoid() * weighted
        return losses.sum() / EXAMPLES

    check(function, reference, cells_of(rng), cells_of(rng))
