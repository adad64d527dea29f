"""What training itself would say of a data set."""

from collections.abc import Sequence
from dataclasses import replace

from vision_jax.data.detection import DetectionSource, check_boxes, make_detection_source
from vision_jax.doctor.finding import Finding, Subject
from vision_jax.errors import UserError


def diagnose_training(subject: Subject, findings: Sequence[Finding]) -> list[Finding]:
    """What training itself says, where it would refuse for a reason that is not told yet."""
    if any(finding.training == "refuses" for finding in findings):
        return []
    try:
        check_boxes(as_training_reads(subject))
    except UserError as error:
        count = len(subject.paths)
        text = str(error).removeprefix(f"{subject.name}: ").partition(":")[0]
        advice = "look for lost annotations, and for boxes outside of their images"
        return [Finding("nothing-to-learn", "error", text, count, count, "images", (), advice)]
    return []


def as_training_reads(subject: Subject) -> DetectionSource:
    """The same images and boxes, cleaned and numbered. Raises UserError where training does."""
    annotations = subject.annotations
    assert annotations is not None
    sizes = annotations.sizes.copy()
    for row, header in enumerate(subject.scan.headers):  # which need not be read once more
        if header is not None and not sizes[row].all():
            sizes[row] = header.upright_size
    return make_detection_source(replace(annotations, sizes=sizes))
