"""Items made one ahead: while one is in use, a thread makes the next."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Ahead(Iterator[Item], Generic[Item]):
    """The items of an iterable, in its order; each is made by one thread while the one before is in use.

    The iterable runs in that thread alone, and an error in it is raised where its item would have been taken. Enter it
    to be sure that the thread has ended when the block is left, whatever ends the block; one item at most was made for
    nothing then.
    """

    def __init__(self, items: Iterable[Item]) -> None:
        self._items = iter(items)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead")
        self._next: Future[Item] = self._thread.submit(next, self._items)

    def __next__(self) -> Item:
        item = self._next.result()
        self._next = self._thread.submit(next, self._items)
        return item

    def close(self) -> None:
        """Wait for the item that is being made, if any, and end the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Ahead[Item]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
