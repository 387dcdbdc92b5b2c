"""An iterator whose steps take long, read from an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator, Iterator
from typing import TypeVar

T = TypeVar("T")
_END = object()


async def iterate(items: Iterator[T]) -> AsyncIterator[T]:
    """The items of a generator, each asked for on a thread, so that the event loop goes on.

    Whoever stops reading, or is cancelled, waits for the item that is being made; then the
    generator is closed.
    """
    try:
        while True:
            making = asyncio.ensure_future(asyncio.to_thread(next, items, _END))
            try:
                item = await asyncio.shield(making)
            except asyncio.CancelledError:
                await asyncio.wait([making])
                making.exception()  # nobody else will ask for it
                raise
            if item is _END:
                return
            yield item  # type: ignore[misc]  # `next` returns an item or the sentinel above
    finally:
        if isinstance(items, Generator):
            items.close()
