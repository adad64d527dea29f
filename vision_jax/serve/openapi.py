"""The interface in OpenAPI 3.1, of the kind of model that is served, and what /model says."""

from collections.abc import Mapping
from typing import Any

import vision_jax
from vision_jax.data.decode import FORMATS
from vision_jax.errors import utf8
from vision_jax.serve.body import Limits
from vision_jax.serve.model import Servable

_TEXT, _NUMBER, _WHOLE = {"type": "string"}, {"type": "number"}, {"type": "integer"}
_BOX = {
    "name": _TEXT,
    "label": _WHOLE,
    "score": _NUMBER,
    "box_xyxy_px": {
        "type": "array",
        "items": _NUMBER,
        "minItems": 4,
        "maxItems": 4,
        "description": "left, top, right and bottom in pixels of the image, upright",
    },
}
_TOP = {
    "type": "array",
    "description": "name and probability, the most probable first",
    "items": {
        "type": "array",
        "prefixItems": [_TEXT, _NUMBER],
        "items": False,
        "minItems": 2,
    },
}


def _record(properties: Mapping[str, Any], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


# By kind: what an image's record has beside name, height and width; and what may be left out.
ANSWERS: Mapping[str, tuple[Mapping[str, Any], tuple[str, ...]]] = {
    "classes": ({"class": _TEXT, "label": _WHOLE, "probability": _NUMBER, "top": _TOP}, ()),
    "boxes": ({"boxes": {"type": "array", "items": _record(_BOX)}}, ()),
    "pixels": (
        {
            "shares": {"type": "object", "additionalProperties": _NUMBER},
            "objects": _WHOLE,
            "mask_png": {
                "type": "string",
                "contentEncoding": "base64",
                "contentMediaType": "image/png",
                "description": "a palette image of the image's size; values are classes",
            },
        },
        ("objects", "mask_png"),
    ),
    "features": ({"features": {"type": "array", "items": _NUMBER}}, ()),
}
QUERY: Mapping[str, tuple[str, dict[str, Any], str]] = {
    "classes": ("top", {"type": "integer", "minimum": 1}, "how many classes to name"),
    "boxes": ("score", {"type": "number", "minimum": 0, "maximum": 1}, "of a box, at least"),
    "pixels": ("mask", {"type": "integer", "enum": [0, 1]}, "0 leaves the mask out"),
}
ERRORS = {
    400: "no image in the request, a damaged form, or an unknown query field",
    408: "the body came too slowly",
    413: "too many bytes, pixels or images; nothing was decoded",
    415: "no image format that is read here",
    422: "a damaged image, or one that the model can't see",
    503: "busy, starting or stopping: try again after Retry-After seconds",
}


def about(servable: Servable, limits: Limits, title: str) -> dict[str, Any]:
    """What there is to know of the model."""
    record: dict[str, Any] = {
        "model": utf8(title),
        "kind": servable.kind,
        "class_names": [utf8(name) for name in servable.class_names],
        "sees": [list(size) for size in servable.canvases],
        "limits": vars(limits) | {"formats": [*FORMATS, "NPY"]},
        "version": vision_jax.__version__,
    }
    if servable.kind == "pixels":
        from vision_jax.tasks.segmentation.figures import palette

        record["colors"] = [
            f"#{bytes(color).hex()}" for color in palette(len(servable.class_names))
        ]
    return record


def describe(servable: Servable, limits: Limits, title: str) -> dict[str, Any]:
    """The OpenAPI document."""
    own, optional = ANSWERS[servable.kind]
    answer = _record({"name": _TEXT, "height": _WHOLE, "width": _WHOLE, **own}, optional)
    failed = _record({"name": _TEXT, "status": _WHOLE, "error": _TEXT})
    images = {"type": "array", "minItems": 1, "items": {"anyOf": [_ref("Answer"), _ref("Failed")]}}
    parameters = []
    if servable.kind in QUERY:
        name, schema, what = QUERY[servable.kind]
        parameters = [{"name": name, "in": "query", "schema": schema, "description": what}]
    file = {"type": "string", "contentMediaType": "application/octet-stream"}
    form = {"type": "object", "properties": {"image": {"type": "array", "items": file}}}
    predict = {
        "summary": "What the images show",
        "description": (
            f"One image as the body, or up to {limits.images} as files of a form, under any field "
            f"name. {', '.join(FORMATS)}, or .npy of u8[H, W, C]; of any size up to "
            f"{limits.pixels:,} pixels. Of several images those that can't be read have an error "
            "in their place; the request fails if none can. No address is ever fetched."
        ),
        "parameters": parameters,
        "requestBody": {
            "required": True,
            "content": {"image/*": {}, "multipart/form-data": {"schema": form}},
        },
        "responses": {
            "200": _response(
                "the answers, in the order of the images", _record({"images": images})
            ),
            **{str(code): _response(text, _ref("Error")) for code, text in ERRORS.items()},
        },
    }
    gets = {
        "/health": "200 once everything is compiled and while requests are taken; else 503",
        "/live": "200 while the server can answer at all; else 503",
        "/metrics": "counts in Prometheus' text format",
        "/model": "kind, class names and limits",
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"vision_jax serve: {utf8(title)}",
            "version": vision_jax.__version__,
            "description": f"A model of {servable.kind}.",
        },
        "paths": {
            "/predict": {"post": predict},
            **{
                path: {"get": {"summary": text, "responses": {"200": {"description": text}}}}
                for path, text in gets.items()
            },
        },
        "components": {
            "schemas": {"Answer": answer, "Failed": failed, "Error": _record({"error": _TEXT})}
        },
    }


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _response(text: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": schema}}}
