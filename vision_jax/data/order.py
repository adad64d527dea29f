"""In which order training sees its images: a pure function of (seed, place in the endless stream).

A process that begins anywhere draws the order of that epoch alone, so that a resumed run sees what
it would have seen, and processes that share a batch draw the same one.
"""

import abc
from typing import Any

import grain
import numpy as np

from vision_jax.data.sources import Source

WINDOW_BYTES = 256 * 2**20  # of examples that are read by blocks; parquet.py keeps two windows


def shuffled(source: Source, seed: int, balance: float = 0.0) -> grain.MapDataset:
    """Endless rows of the source: each once an epoch, or classes in other shares by `balance`."""
    rows, blocks = grain.MapDataset.range(len(source)).seed(seed), source.blocks()
    if balance:
        order = BalancedOrder(source.labels, balance, seed, blocks)
        return rows.repeat().map_with_index(order)
    if blocks is None:
        return rows.shuffle().repeat()
    return rows.repeat().map_with_index(BlockOrder(*blocks, seed))


class _EpochOrder(abc.ABC):
    """Rows by place, from the order of one epoch after the other; two epochs are kept."""

    def __init__(self, length: int, seed: int):
        self.length, self.seed = length, seed
        self._epochs: dict[int, np.ndarray] = {}

    def __call__(self, index: int, row: int) -> int:
        del row
        epoch, place = divmod(index, self.length)
        order = self._epochs.get(epoch)
        if order is None:
            order = self.order(epoch)
            self._epochs = {epoch: order, **dict(list(self._epochs.items())[:1])}  # threads overlap
        return int(order[place])

    @abc.abstractmethod
    def order(self, epoch: int) -> np.ndarray:
        """i64[N], a function of seed and epoch."""

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_epochs": {}}


class BlockOrder(_EpochOrder):
    """The order of examples that are read by blocks, so that each block is read once an epoch.

    Blocks come in random order, in windows of `WINDOW_BYTES` or one block; the examples of a window
    come in random order. What fits one window is shuffled as a whole.

    Args:
      block: i64[N], the block of each example.
      sizes: i64[B], bytes.
      seed: 0 ≤ seed < 2³².
    """

    def __init__(self, block: np.ndarray, sizes: np.ndarray, seed: int):
        super().__init__(len(block), seed)
        self.block, self.sizes = block, sizes

    def order(self, epoch: int) -> np.ndarray:
        """i64[N], a function of seed and epoch."""
        return self.place(np.arange(self.length), np.random.default_rng((self.seed, epoch)))

    def place(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """These rows, any of them several times, in the order of their blocks' windows."""
        used = np.unique(self.block)
        shuffled = rng.permutation(used)
        window = np.zeros(len(self.sizes), np.int64)
        window[shuffled] = np.cumsum(self.sizes[shuffled]) // WINDOW_BYTES
        return rows[np.lexsort((rng.random(len(rows)), window[self.block[rows]]))]


class BalancedOrder(_EpochOrder):
    """An order in which rare classes come more often than there are images of them.

    A class of n images has a share of n^(1 - balance) over the sum of all classes' (Kang et al.
    2020, https://arxiv.org/abs/1910.09217, equation 1, whose q is 1 - balance): at 0 what it has by
    itself, at 1 the same as each other class, at 0.5 by the square root. An epoch has as many
    places as there are images. Of N of them a class with the share p gets N p on average over
    epochs, and within one of it in each; its images fill them in turn, each as often as another but
    for one, drawn anew each epoch.

    Args:
      labels: i32[N], from 0.
      balance: 0 < balance ≤ 1.
      seed: 0 ≤ seed < 2³².
      blocks: of examples that are read by blocks, see BlockOrder: then an image that comes several
        times does so within its block's window.
    """

    def __init__(
        self,
        labels: np.ndarray,
        balance: float,
        seed: int,
        blocks: tuple[np.ndarray, np.ndarray] | None = None,
    ):
        super().__init__(len(labels), seed)
        self.labels, self.blocks = labels, BlockOrder(*blocks, seed) if blocks else None
        self.sizes = np.bincount(labels)
        weights = np.where(self.sizes, np.maximum(self.sizes, 1.0) ** (1 - balance), 0)
        self.ends = len(labels) * np.cumsum(weights) / weights.sum()
        self.ends[-1] = len(labels)  # whatever rounding has made of it

    def order(self, epoch: int) -> np.ndarray:
        """i64[N], a function of seed and epoch."""
        rng = np.random.default_rng((self.seed, epoch, 1))
        rows = np.repeat(np.arange(self.length), self._times(rng))
        return self.blocks.place(rows, rng) if self.blocks else rng.permutation(rows)

    def _times(self, rng: np.random.Generator) -> np.ndarray:
        """How often each image comes in an epoch, i64[N]; N in all."""
        # Systematic sampling: places at whole distances from a random start, counted by class.
        ends = np.floor(self.ends + rng.random()).astype(np.int64)
        whole, rest = np.divmod(np.diff(ends, prepend=0), np.maximum(self.sizes, 1))
        in_turn = np.lexsort((rng.random(self.length), self.labels))
        first = np.cumsum(self.sizes) - self.sizes
        turn = np.empty(self.length, np.int64)
        turn[in_turn] = np.arange(self.length) - first[self.labels[in_turn]]
        return whole[self.labels] + (turn < rest[self.labels])


class OwnRows(grain.MapDataset):
    """One process's rows of each global batch: neighbours, as they lie on the mesh.

    So the place of an example in the global batch does not depend on how many processes read it,
    nor does what is drawn for that place: dropout, the random start of an attack.

    Args:
      parent: examples in the order of the global batches.
      rows: of a batch that are this process's.
      process_index: which of the processes this one is.
      process_count: how many there are, each with as many rows.
    """

    def __init__(
        self, parent: grain.MapDataset, rows: int, process_index: int, process_count: int
    ) -> None:
        super().__init__(parent)
        self._rows, self._index, self._count = rows, process_index, process_count

    def __len__(self) -> int:
        return len(self._parent) // (self._rows * self._count) * self._rows

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, self._rows)
        return self._parent[(batch * self._count + self._index) * self._rows + row]
