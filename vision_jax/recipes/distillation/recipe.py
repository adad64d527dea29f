"""Distillation as a recipe: the fields of a config's section, checked and applied.

    config.distill -> teachers -> arrays among the frozen ones, and an Objective that runs them

The command cache-teacher runs them once over all steps of a run and stores their outputs; a run of
that config with config.distill.cache reads these instead, and has bit-identical losses.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vision_jax import convert
from vision_jax.data.teacher_cache import open_teacher_cache
from vision_jax.errors import UserError
from vision_jax.models import families
from vision_jax.models.families import FAMILIES
from vision_jax.objective import Objective
from vision_jax.ops.detection_outputs import POSTPROCESS
from vision_jax.recipes.distillation import objective as distillation
from vision_jax.recipes.distillation.objective import (
    AVERAGE,
    AVERAGE_PREFIX,
    Layout,
    Match,
    Read,
    Term,
)
from vision_jax.recipes.distillation.teachers import Teacher, find_teachers
from vision_jax.recipes.recipe import Recipe, StepOptions, Student, mixed_targets
from vision_jax.steps import Flat

# Neither changes an image: how the data is read.
_READING = ("data.eval", "data.threads", "data.workers")
_OUTPUT_FIELDS = ("logits", "temperature", "teacher_weights", "top_k", "dtype")
# Kinds of config.distill.logits that fit what a student predicts, of which others have none.
_KINDS = {
    "classes": ("soft", "hard", "decoupled"),
    "softmax_set": ("queries",),
    "sigmoid_set": ("queries",),
    "cells": ("detections", "cells"),
    "semantic": ("soft", "hard"),
}
_DETECTORS = ("queries", "detections", "cells")


@dataclass(frozen=True)
class Distill(Recipe):
    """Learning from teachers.

    Attributes:
      fields: of the config, by dotted name.
    """

    fields: Mapping[str, Any]

    def _of(self, name: str) -> Any:
        return self.fields[f"distill.{name}"]

    @cached_property
    def teachers(self) -> tuple[Teacher, ...]:
        """The models; read once.

        Raises:
          UserError: no teachers, or none that can be used.
        """
        if not self._of("teachers"):
            raise UserError(
                "config.recipes has distill: set config.distill.teachers to finished runs or "
                f"weights, or to {AVERAGE} for the student's own moving average"
            )
        return find_teachers(
            [name for name in self._of("teachers") if name != AVERAGE],
            task=self.fields["task"],
            dtype=self._of("dtype"),
            allow_pickle=self.fields["model.allow_pickle"],
        )

    @property
    def by_average(self) -> bool:
        """Whether the student's moving average is among the teachers."""
        return AVERAGE in self._of("teachers")

    @property
    def features(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the student's features that are compared."""
        heads = ("head", "head_dist") if self._of("token") else ()
        return tuple(dict.fromkeys([*heads, *(layer for _, layer, *_ in self._of("features"))]))

    @property
    def step(self) -> StepOptions:  # type: ignore[override]
        """Where the objective finds the moving average, if that is the teacher."""
        return StepOptions(average_prefix=AVERAGE_PREFIX if self.by_average else "")

    def sources(self) -> tuple[tuple[str, str], ...]:
        """(origin, sha256) of each teacher."""
        return tuple((t.weights.origin, t.weights.sha256) for t in self.teachers)

    def lines(self) -> list[str]:
        """Each teacher, and the file of its outputs if they are cached."""
        cached = f", outputs cached in {self._of('cache')}" if self._of("cache") else ""
        return [
            f"teacher: {origin} (sha256 {sha256[:16]}){cached}" for origin, sha256 in self.sources()
        ]

    # Arrays ---------------------------------------------------------------------------------------

    def abstract(self, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
        """The teachers' arrays, sharded as the student's parameters are by default."""
        return {path: leaf for t in self.teachers for path, leaf in t.abstract(mesh).items()}

    def place(self, mesh: Mesh) -> Flat:
        """The arrays of all teachers; none where their outputs are cached."""
        if self._of("cache"):
            return {}
        return self.place_teachers(mesh)

    def place_teachers(self, mesh: Mesh) -> Flat:
        """The arrays of all teachers."""
        return {path: leaf for t in self.teachers for path, leaf in t.place(mesh).items()}

    def beside(self, student: Student) -> dict[str, tuple[int, int]]:
        """Shapes of the kernels that bring the student's features to the teacher's."""
        if self.by_average:
            return {}
        found = {}
        for number, (kind, layer, teacher_layer, _) in enumerate(self._of("features")):
            if kind not in distillation.PROJECTED:
                continue
            own = _feature_shape(student.model, student.image_size, layer)[-1]
            first = self.teachers[0]
            size = first.own_size or student.image_size
            theirs = _feature_shape(first.model, size, teacher_layer)[-1]
            if own != theirs:
                found[f"{distillation.PROJECTION}{number}/kernel"] = (own, theirs)
        return found

    def view_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """The largest that student or teachers take."""
        sizes = [image_size, *(t.image_size for t in self.teachers if t.image_size)]
        return max(size[0] for size in sizes), max(size[1] for size in sizes)

    # Checks ---------------------------------------------------------------------------------------

    def check(self, student: Student) -> None:
        """Raises UserError for what can't be learned from these teachers, or by these means."""
        logits, kind = f"config.distill.logits {self._of('logits')}", self._of("logits")
        if kind == "none" and not self._of("features"):
            raise UserError(f"{logits}: with no features either there is nothing to learn from")
        if self.by_average:
            self._check_average()
        allowed = _KINDS.get("classes" if student.labels_images else student.predicts, ())
        if kind not in (*allowed, "none"):
            last = f"{', '.join(allowed)} or none" if allowed else "none, with distill.features"
            raise UserError(f"{logits}: for the student, a {student.family}, it is {last}")
        mixed = mixed_targets(self.fields, "mixup", "cutmix")
        if kind == "decoupled" and mixed:
            raise UserError(
                f"{logits} sets the one true class apart, and config.{mixed} makes targets of "
                "several: set it to 0, or take soft"
            )
        if self._of("token") and not getattr(student.model, "distillation_token", False):
            raise UserError(
                "config.distill.token: the student has no distillation token: add "
                "('distillation_token', True) and ('position_prefix', 2) to config.model.arguments"
            )
        if self._of("top_k") and kind in _DETECTORS:
            raise UserError("config.distill.top_k is for classes of whole images: set it to 0")
        if student.predicts == "semantic":
            self._check_pixels(student)
        if self._of("cache") and kind == "cells":
            raise UserError(
                "config.distill.cache: all cells of an image are megabytes, as many as its canvas "
                "has: take config.distill.logits=detections"
            )
        weights, teachers = self._of("teacher_weights"), self._of("teachers")
        if weights and len(weights) != len(teachers):
            raise UserError(
                f"config.distill.teacher_weights: {len(weights)} for {len(teachers)} teachers"
            )
        if self._of("cache") and self.fields["optim.accumulate"] > 1:
            raise UserError(
                "config.distill.cache: teacher outputs depend, in their last bits, on how many "
                "images a batch has: set config.optim.accumulate to 1"
            )
        for teacher in self.teachers if kind != "none" else ():
            count = teacher.model.num_classes
            if count != len(student.class_names):
                raise UserError(
                    f"config.distill.teachers: {teacher.weights.origin} knows {count} classes and "
                    f"the data has {len(student.class_names)}: take another teacher, or learn from "
                    "its features with config.distill.logits=none"
                )
        if kind in _DETECTORS:
            self._check_detectors(student)

    def _check_pixels(self, student: Student) -> None:
        """Of a segmenter, whose logits are of each pixel."""
        for name in ("cache", "top_k"):
            if self._of(name):
                raise UserError(
                    f"config.distill.{name}: logits of all pixels of an image are megabytes, and"
                    " the teacher is run beside the student: leave it at its default"
                )
        if self._of("logits") == "none":
            return
        if len(self._of("teachers")) > 1:
            raise UserError(
                "config.distill.teachers: masks of several teachers are not put together: name one"
            )
        for teacher in self.teachers:
            if teacher.predicts != "semantic":
                raise UserError(
                    f"config.distill.teachers: {teacher.weights.origin}, a {teacher.family}, does"
                    " not give logits of pixels: take another one"
                )
        self._check_class_order(student)

    def _check_detectors(self, student: Student) -> None:
        kind = self._of("logits")
        if len(self._of("teachers")) > 1:
            raise UserError(
                f"config.distill.teachers: {kind} of several detectors are not put together: name "
                "one"
            )
        for teacher in self.teachers if kind != "detections" else ():
            if teacher.predicts != student.predicts:
                others = " or ".join(k for k in _KINDS[student.predicts] if k != kind) or "none"
                raise UserError(
                    f"config.distill.logits {kind}: {teacher.weights.origin}, a {teacher.family}, "
                    f"does not predict what a {student.family} does: set it to {others}"
                )
        self._check_class_order(student)

    def _check_class_order(self, student: Student) -> None:
        for teacher in self.teachers:
            for label, name in enumerate(convert.class_names_of(teacher.weights) or ()):
                own = student.class_names.index(name) if name in student.class_names else label
                if own != label:
                    raise UserError(
                        f"config.distill.teachers: {teacher.weights.origin} has class {label} for "
                        f"{name}, and the data {own}: take a teacher of the same classes in the "
                        "same order"
                    )

    def _check_average(self) -> None:
        if not self.fields["optim.ema_decay"]:
            raise UserError(
                f"config.distill.teachers: {AVERAGE} is the moving average: set "
                "config.optim.ema_decay, for example to 0.999"
            )
        if len(self._of("teachers")) > 1:
            raise UserError(f"config.distill.teachers: {AVERAGE} can only be the one teacher")
        if self._of("cache"):
            raise UserError(
                f"config.distill.cache: {AVERAGE} changes with each step and can't be stored"
            )

    # The objective --------------------------------------------------------------------------------

    def transform(self, objective: Objective, student: Student) -> Objective:
        """The objective of a student of these teachers.

        Raises:
          UserError: a student without what is compared, or whose loss does not add up with terms
            of micro-batches.
        """
        accumulates = self.fields["optim.accumulate"] > 1
        if objective.counted and accumulates and self._of("features"):
            raise UserError(
                "config.optim.accumulate: the loss of this student weighs micro-batches by their "
                f"{objective.counted}, which terms of config.distill.features don't: set it to 1"
            )
        layers = tuple(dict.fromkeys(layer for _, _, layer, _ in self._of("features")))
        forwards = [
            t.make_forward(layers if number == 0 else ()) for number, t in enumerate(self.teachers)
        ]
        predicts = [t.predicts for t in self.teachers]
        if self.by_average:
            forwards, predicts = [distillation.make_average_forward(objective)], [student.predicts]
        teacher_outputs = distillation.make_teacher_outputs(
            forwards,
            logits=self._of("logits"),
            temperature=self._of("temperature"),
            weights=self._of("teacher_weights"),
            top_k=self._of("top_k"),
            layers=layers,
            read=self._read(predicts[0]),
        )
        size = student.image_size
        return distillation.distill(
            objective,
            teacher_outputs=teacher_outputs,
            terms=self._terms(student),
            share=0.0 if self._of("logits") == "none" else self._of("weight"),
            image_size=size if self.view_size(size) != size else None,
            label_head="head" if self._of("token") else "",
            sharded=self.fields["mesh.fsdp"] != 1,
            counted=[f"taught_{kind}" for kind in ("detections", "cells")],
        )

    def _read(self, predicts: str) -> Read | None:
        """What is kept of the outputs of a teacher that predicts so."""
        kind = self._of("logits")
        if kind == "queries":
            return distillation.read_queries
        if kind == "cells":
            return distillation.read_cells
        if kind != "detections":
            return None
        most = self.fields["data.max_boxes"]
        return distillation.make_read_detections(POSTPROCESS[predicts], most)

    def _terms(self, student: Student) -> dict[str, tuple[float, Term]]:
        """(weight, loss) of each of the teacher outputs, by the name of its metric."""
        terms: dict[str, tuple[float, Term]] = {}
        kind, temperature = self._of("logits"), self._of("temperature")
        if kind == "queries":
            term = distillation.make_queries_term(
                sigmoid=student.predicts == "sigmoid_set",
                temperature=temperature,
                num_queries=student.model.num_queries,
            )
            terms["taught_queries"] = (self._of("weight"), term)
        elif kind == "detections":
            term = distillation.make_detections_term(
                strides=student.model.strides, least_score=self._of("least_score")
            )
            terms["taught_detections"] = (self._of("weight"), term)
        elif kind == "cells":
            term = distillation.make_cells_term(
                strides=student.model.strides, temperature=temperature
            )
            terms["taught_cells"] = (self._of("weight"), term)
        elif kind != "none" and student.predicts == "semantic":
            term = distillation.make_pixels_term(kind, temperature=temperature)
            terms[f"taught_{kind}"] = (self._of("weight"), term)
        elif kind != "none":
            head = "head_dist" if self._of("token") else ""
            term = distillation.make_logits_term(kind, temperature=temperature, head=head)
            terms[f"taught_{kind}"] = (self._of("weight"), term)
        trained = self.beside(student)
        first = self.teachers[0].model if self.teachers else student.model
        layouts = (_layout(student.model), _layout(first))
        for number, (kind, layer, teacher_layer, weight) in enumerate(self._of("features")):
            path = f"{distillation.PROJECTION}{number}/kernel"
            match = Match(kind, layer, teacher_layer, path if path in trained else "")
            terms[f"taught_{kind}_{layer}"] = (
                weight,
                distillation.make_features_term(match, *layouts),
            )
        return terms

    # Cached teacher outputs -----------------------------------------------------------------------

    def identity(self, views: Any) -> dict[str, Any]:
        """What a file of cached teacher outputs belongs to: all that they depend on.

        `views` is the preprocessing of the images that are read.
        """

        def section(name: str) -> dict[str, Any]:
            return {
                field.removeprefix(f"{name}."): value
                for field, value in sorted(self.fields.items())
                if field.startswith(f"{name}.") and field not in _READING
            }

        return {
            "teachers": [
                [teacher.weights.sha256, teacher.family, list(teacher.own_size or ())]
                for teacher in self.teachers
            ],
            "layers": [layer for _, _, layer, _ in self._of("features")],
            "distill": {name: self._of(name) for name in _OUTPUT_FIELDS},
            "seed": self.fields["seed"],
            "batch_size": self.fields["batch_size"],
            "data": section("data"),
            "augment": section("augment"),
            "views": asdict(views),
        }

    def open_stored(self, views: Any) -> Callable[[int], dict[str, np.ndarray]] | None:
        """From the number of a step to the cached teacher outputs of its batch; None without.

        Raises:
          UserError: no such file, one of another run, or one of a shorter run.
        """
        if not self.teachers or not self._of("cache"):
            return None
        batch_size, steps = self.fields["batch_size"], self.fields["total_steps"]
        cache = open_teacher_cache(self._of("cache"), self.identity(views))
        if cache.count < steps * batch_size:
            raise UserError(
                f"{cache.path}: has the teacher outputs of {cache.count} images, and "
                f"config.total_steps {steps} need {steps * batch_size}: cache more with "
                "the command cache-teacher"
            )
        processes = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        own = batch_size // jax.process_count()
        return lambda step: cache.batch(step, own, **processes)

    def make_teacher_outputs(
        self, objective: Objective, student: Student
    ) -> Callable[[Flat, Mapping[str, Any], Any], dict[str, jax.Array]]:
        """(the teachers' arrays, batch, number of the step) -> teacher outputs of its view."""
        distilling = self.transform(objective, student)

        def teacher_outputs(arrays, batch, step):
            key = jax.random.fold_in(jax.random.key(self.fields["seed"]), step)
            prepare_key, _ = jax.random.split(key)  # as steps.make_train_step and make_loss do
            view = distilling.prepare({}, arrays, {}, {**batch, "step": step}, prepare_key)
            prefix = distillation.TEACHER_OUTPUT
            return {name: view[name] for name in view if name.startswith(prefix)}

        return teacher_outputs


def make(fields: Mapping[str, Any]) -> Distill:
    """The recipe of a config's section distill; no teacher is read yet."""
    return Distill(fields)


def _feature_shape(model: Any, image_size: tuple[int, int], name: str) -> tuple[int, ...]:
    images = jax.ShapeDtypeStruct((1, *image_size, model.in_channels), jnp.float32)
    key = jax.random.key(0)
    variables = jax.eval_shape(lambda: families.initialize(model, key, image_size))
    pixel_mask = [jax.ShapeDtypeStruct((1, *image_size), jnp.bool_)]
    masked = FAMILIES[families.family_of(model)].pixel_mask
    _, found = jax.eval_shape(
        lambda variables, *inputs: families.apply_with_features(
            model, variables, *inputs, names=[name], train=False
        ),
        variables,
        images,
        *(pixel_mask if masked else []),
    )
    return found[name].shape


def _layout(model: Any) -> Layout:
    """Of a transformer's tokens; maps say themselves how they lie."""
    if not hasattr(model, "patch_size") or FAMILIES[families.family_of(model)].pixel_mask:
        return Layout(None, 0)
    rows, columns = (side // model.patch_size for side in model.image_size)
    return Layout((rows, columns), getattr(model, "num_prefix", 1))
