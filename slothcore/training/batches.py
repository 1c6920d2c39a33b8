"""Which rows meet in which optimizer step.

A row is a list of documents: one for plain training, several for packed training. The order of every epoch is a pure
function of the seed and the epoch, so a run is resumed by its step number alone.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from slothcore.data.masking import TokenizedRow
from slothcore.data.packing import pack_first_fit_decreasing
from slothcore.data.token_store import TokenStore


@dataclass(frozen=True)
class MicroBatch:
    """Documents laid end to end, on the host.

    input_ids, labels [T] int64; cu_seqlens [documents + 1] int32. T = tokens, none of them padding.
    """

    input_ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor


@dataclass(frozen=True)
class StepPlan:
    """The rows of one optimizer step and what the loss is divided by."""

    epoch: int
    rows: list[int]
    num_targets: int
    num_tokens: int


class RowSet:
    """Rows ready to be batched.

    Tokens and labels stay end to end in the flat arrays of a `TokenStore`, at most 8 bytes a token, in memory or in
    mapped files; lists of Python numbers take six times as much. So a million documents fit on a host, and a
    micro-batch is a few slices.

    Args:
        documents: tokenised documents, every one with at least one target; rows are copied and not kept, a store is
            read where it is.
        capacity: pack documents into rows of at most this many tokens; None: one document a row.
    """

    def __init__(self, documents: Sequence[TokenizedRow] | TokenStore, *, capacity: int | None = None) -> None:
        self._store = documents if isinstance(documents, TokenStore) else TokenStore.from_rows(documents)
        self._starts = self._store.starts.tolist()
        lengths, targets = self._store.lengths.tolist(), self._store.targets.tolist()
        singles = [[index] for index in range(len(lengths))]
        self.rows = singles if capacity is None else pack_first_fit_decreasing(lengths, capacity)
        self.row_tokens = [sum(lengths[i] for i in row) for row in self.rows]
        self.row_targets = [sum(targets[i] for i in row) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def document_lengths(self) -> list[int]:
        """Tokens of each document."""
        return self._store.lengths.tolist()

    def num_known(self, documents: TokenStore) -> int:
        """How many of other documents are among these, token by token."""
        return documents.num_also_in(self._store)

    def micro_batch(self, rows: Sequence[int]) -> MicroBatch:
        """The documents of `rows`, end to end."""
        pieces = [slice(self._starts[index], self._starts[index + 1]) for row in rows for index in self.rows[row]]
        boundaries = [0, *accumulate(piece.stop - piece.start for piece in pieces)]
        return MicroBatch(
            input_ids=torch.from_numpy(np.concatenate([self._store.ids[piece] for piece in pieces])).long(),
            labels=torch.from_numpy(np.concatenate([self._store.labels_of(piece) for piece in pieces])).long(),
            cu_seqlens=torch.tensor(boundaries, dtype=torch.int32),
        )

    def micro_batches(self, rows: Sequence[int], size: int) -> Iterator[MicroBatch]:
        """`rows` in order, `size` at a time."""
        for start in range(0, len(rows), size):
            yield self.micro_batch(rows[start : start + size])

    def merged(self, rows: Sequence[int], token_budget: int) -> list[list[int]]:
        """`rows` in groups of at most `token_budget` tokens, as few as first-fit decreasing finds.

        No row is divided: one of more tokens is a group of its own. Deterministic; rows and groups keep their order.
        """
        alone = [[row] for row in rows if self.row_tokens[row] > token_budget]
        others = [row for row in rows if self.row_tokens[row] <= token_budget]
        packed = pack_first_fit_decreasing([self.row_tokens[row] for row in others], token_budget)
        groups = [[others[i] for i in sorted(group)] for group in packed]
        place = {row: i for i, row in enumerate(rows)}
        return sorted(alone + groups, key=lambda group: place[group[0]])

    def fingerprint(self) -> str:
        """A hash of every token, label and boundary: equal only for the same data in the same order."""
        digest = hashlib.sha256()
        for piece in self._store.blocks():
            digest.update(np.ascontiguousarray(self._store.ids[piece]).data)
        for piece in self._store.blocks():
            digest.update(np.ascontiguousarray(self._store.labels_of(piece)).data)
        digest.update(self._store.starts.data)
        digest.update(repr(self.rows).encode())
        return digest.hexdigest()


class StepSchedule:
    """Optimizer step number -> its rows. Steps count from 0; the last step of an epoch may have fewer rows.

    Args:
        max_steps: the number of steps; -1: as many as `num_train_epochs` passes over the rows take.
    """

    def __init__(
        self, rows: RowSet, *, step_rows: int, seed: int, max_steps: int = -1, num_train_epochs: float = 1.0
    ) -> None:
        self.rows, self.step_rows, self.seed = rows, step_rows, seed
        self.steps_per_epoch = math.ceil(len(rows) / step_rows)
        self.total_steps = max_steps if max_steps > 0 else math.ceil(num_train_epochs * self.steps_per_epoch)
        self._order: tuple[int, list[int]] = (-1, [])

    def plan(self, step: int) -> StepPlan:
        """What optimizer step `step` trains on."""
        epoch, position = divmod(step, self.steps_per_epoch)
        chosen = self._epoch_order(epoch)[position * self.step_rows : (position + 1) * self.step_rows]
        return StepPlan(
            epoch=epoch,
            rows=chosen,
            num_targets=sum(self.rows.row_targets[row] for row in chosen),
            num_tokens=sum(self.rows.row_tokens[row] for row in chosen),
        )

    def _epoch_order(self, epoch: int) -> list[int]:
        if self._order[0] != epoch:
            # seed + epoch would give epoch 1 of seed 0 the order of epoch 0 of seed 1.
            digest = hashlib.sha256(f"{self.seed}/{epoch}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            self._order = (epoch, torch.randperm(len(self.rows), generator=generator).tolist())
        return self._order[1]
