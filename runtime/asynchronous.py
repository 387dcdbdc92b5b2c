"""An iterator whose steps take long, read from an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")
_END = object()


async def iterate(items: Iterator[T]) -> AsyncIterator[T]:
    """The items of a generator, each asked for on a thread, so that the event loop goes on.

    Whoever stops reading, or is cancelled, however often, waits for the item that is being made;
    then the generator is closed.
    """
    loop = asyncio.get_running_loop()
    try:
        while True:
            # Not a task, which a loop that ends would cancel while the thread goes on.
            following = partial(copy_context().run, next, items, _END)
            making: asyncio.Future[Any] = loop.run_in_executor(None, following)
            try:
                item = await asyncio.shield(making)
            except asyncio.CancelledError:
                while not making.done():
                    with suppress(asyncio.CancelledError):  # raised again below
                        await asyncio.wait([making])
                making.exception()  # nobody else will ask for it
                raise
            if item is _END:
                return
            yield item
    finally:
        if isinstance(items, Generator):
            items.close()
