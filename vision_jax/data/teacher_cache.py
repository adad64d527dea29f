"""Cached teacher outputs: those of each example of a run, stored once and read in training.

Latents of a generator's images are stored in the same way (data/latents.py).

    write_teacher_cache(path, batches, identity)     arrays of each example, in the order of the run
    open_teacher_cache(path, identity)               -> TeacherCache; .read(numbers), .batch(step)

One file of ArrayRecord. Record n holds the teacher's arrays for example n of the run, their bytes
as they are, and they are read back bit-identical. What n counts is the writer's to say. Where the
views are augmented it is the place in the training stream (step · batch size + row), because a view
is a function of the seed and its place; without augmentation it may be the row in the source.

The last record says what the arrays are and what they belong to, the `identity`: the teacher's
sha256, its preprocessing, the seed and settings of the augmentation, the form (top k, temperature).
A file is read by a run of the same identity only. What training computes from the stored form it
must compute from the same form of a live teacher: see ops.distillation.compress_logits.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from vision_jax.errors import UserError
from vision_jax.files import draft_folder, parse_json

FORMAT = "vision_jax teacher cache 1"
# Floats don't compress, and a group of one record is read without its neighbors.
_WRITE = "group_size:1,uncompressed"
_READ = "readahead_buffer_size:0,max_parallelism:0"

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class TeacherCache:
    """A file of cached teacher outputs. Picklable, and may be read from several threads.

    Attributes:
      path: of the file.
      record: numpy's structured dtype of one example.
      count: examples in the file.
    """

    path: Path
    record: np.dtype
    count: int

    def read(self, numbers: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """The teacher outputs [B, ...] of examples, by their numbers.

        Raises:
          UserError: a number that the file has not, or a file that was damaged.
        """
        wanted = [int(number) for number in numbers]
        outside = [number for number in wanted if not 0 <= number < self.count]
        if outside:
            raise UserError(
                f"{self.path}: has the teacher outputs of {self.count} examples and not of number "
                f"{outside[0]}: cache more, or train for fewer steps"
            )
        try:
            raw = b"".join(self._reader.read(wanted))
            examples = np.frombuffer(raw, self.record)
        except (RuntimeError, ValueError) as error:
            raise _damaged(self.path, error) from error
        return {name: np.ascontiguousarray(examples[name]) for name in self.record.names or ()}

    def batch(
        self, step: int, batch_size: int, *, process_index: int = 0, process_count: int = 1
    ) -> dict[str, np.ndarray]:
        """The arrays of one batch of the training stream, as data.pipeline deals it out.

        Args:
          step: batches before this one.
          batch_size: rows of this process.
          process_index: process 0 has the first rows of each global batch.
          process_count: of processes.
        """
        first = (step * process_count + process_index) * batch_size
        return self.read(first + np.arange(batch_size))

    @cached_property
    def _reader(self) -> ArrayRecordReader:
        return ArrayRecordReader(str(self.path), options=_READ)

    def __reduce__(self) -> Any:  # an open file stays behind
        return TeacherCache, (self.path, self.record, self.count)


def write_teacher_cache(
    path: str | Path, batches: Iterable[Arrays], identity: Mapping[str, Any]
) -> int:
    """Stores teacher outputs, whole or not at all: a temporary file beside it is renamed.

    Args:
      path: of the file; one that is there is replaced.
      batches: {name: [B, ...]} in the order of the examples' numbers, of any sizes B; names, dtypes
        and shapes are those of the first batch.
      identity: what the arrays belong to, as JSON can say it.

    Returns:
      The number of examples.

    Raises:
      UserError: no batches, batches of different kinds, or a folder that cannot be written.
    """
    path = Path(path)
    record, count = None, 0
    with ExitStack() as stack:
        with _explained(path):
            draft = stack.enter_context(draft_folder(path)) / path.name
        with _explained(path):
            writer = ArrayRecordWriter(str(draft), _WRITE)
        for batch in batches:
            examples = _pack(batch, record, path)
            record = examples.dtype
            with _explained(path):
                for example in examples:
                    writer.write(example.tobytes())
            count += len(examples)
        if record is None:
            raise UserError(f"{path}: there are no examples to store teacher outputs of")
        fields = {name: (record[name].base.name, record[name].shape) for name in record.names or ()}
        header = {"format": FORMAT, "count": count, "fields": fields, "identity": identity}
        with _explained(path):
            writer.write(json.dumps(header).encode())
            writer.close()
            with draft.open("rb+") as file:
                os.fsync(file.fileno())
            draft.replace(path)
    return count


def open_teacher_cache(path: str | Path, identity: Mapping[str, Any]) -> TeacherCache:
    """Opens a file for a run.

    Raises:
      UserError: no such file, another file, a damaged one, or one of another identity, with the
        first difference.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file: store the teacher's outputs first")
    try:
        reader = ArrayRecordReader(str(path), options=_READ)
        count = reader.num_records() - 1
        header = parse_json(reader.read([count])[0], str(path)) if count >= 0 else {}
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise UserError(
                f"{path}: no cached teacher outputs, or not all of them: store them again"
            )
        theirs, fields = _leaves(header["identity"]), header["fields"].items()
        record = np.dtype([(name, np.dtype(kind), tuple(shape)) for name, (kind, shape) in fields])
        whole = header["count"] == count and not record.hasobject
    except UserError:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise _damaged(path, error) from error
    if not whole:
        raise UserError(f"{path}: not all of the cached teacher outputs: store them again")
    ours = _leaves(json.loads(json.dumps(identity)))
    for name in sorted(theirs | ours):
        if theirs.get(name) != ours.get(name):
            raise UserError(
                f"{path}: stored with {name} {_short(theirs.get(name))}, and this run has "
                f"{_short(ours.get(name))}: store it again, or run as it was stored"
            )
    return TeacherCache(path, record, count)


def _pack(batch: Arrays, record: np.dtype | None, path: Path) -> np.ndarray:
    """The examples of a batch, one structured element each."""
    arrays = {name: np.asarray(array) for name, array in batch.items()}
    own = np.dtype([(name, array.dtype, array.shape[1:]) for name, array in arrays.items()])
    sizes = {len(array) for array in arrays.values()}
    if len(sizes) != 1 or own not in (record, own if record is None else None):
        raise UserError(f"{path}: a batch of {own}, {sorted(sizes)} examples, after {record}")
    examples = np.empty(sizes.pop(), own)
    for name, array in arrays.items():
        examples[name] = array
    return examples


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # the writer's are RuntimeErrors
        reason = getattr(error, "strerror", None) or str(error).partition(";")[0]
        raise UserError(f"{path}: not written ({reason}); give another path") from error


def _damaged(path: Path, error: Exception) -> UserError:
    reason = str(error).partition(";")[0]
    return UserError(f"{path}: damaged ({reason}): store the teacher's outputs again")


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    """Scalars and lists of nested dicts, by the path to them."""
    if not isinstance(value, dict):
        return {name: value}
    found: dict[str, Any] = {}
    for key, part in value.items():
        found |= _leaves(part, f"{name}.{key}" if name else str(key))
    return found


def _short(value: Any) -> str:
    return value[:16] if isinstance(value, str) and len(value) == 64 else repr(value)
