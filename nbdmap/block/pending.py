"""What `submit` returns: DONE, Failed, Deferred or a coroutine, and how coroutines are run eagerly. See nbdmap.block.io, which
also exports all of this.

Never compiled (setup.py): mypyc's classes cannot inherit from the abstract Coroutine and stay themselves to isinstance.
"""

import asyncio
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator
from functools import partial
from typing import Any, Final

Pending = Coroutine[Any, Any, None]
"""What `submit` returns: to be awaited, or run eagerly, exactly once."""


class _Done(Coroutine[Any, Any, None]):
    """The class of DONE."""

    __slots__ = ()

    def send(self, value: Any) -> Any:
        raise StopIteration

    def throw(self, *error: Any) -> Any:
        raise error[0]

    def close(self) -> None:
        pass

    def __await__(self) -> Iterator[Any]:  # type: ignore[override]  # an iterator will do
        return iter(())


DONE: Final[Pending] = _Done()
"""A request that is done. Unlike others it may be awaited as often as one likes."""


class Failed(_Done):
    """A request that has failed."""

    __slots__ = ("error",)

    def __init__(self, error: Exception) -> None:
        self.error = error

    def send(self, value: Any) -> Any:
        """Raises the error."""
        raise self.error

    def __await__(self) -> Iterator[Any]:  # type: ignore[override]
        raise self.error


class Deferred(Coroutine[Any, Any, None]):
    """A request that ends when somebody calls `finish`.

    It is awaited like any other, or told what to call with `then`. A cancellation of who awaits it calls `on_cancel`, which
    should end it soon; in any case it is waited for, because until then the request's buffer is in use.
    """

    __slots__ = ("_callbacks", "_steps", "ended", "error", "on_cancel")

    def __init__(self, on_cancel: Callable[[], object] | None = None) -> None:
        self.ended = False
        self.error: BaseException | None = None
        self.on_cancel = on_cancel
        self._callbacks: list[Callable[[BaseException | None], object]] = []
        self._steps: Generator[Any, Any, None] | None = None

    def finish(self, error: BaseException | None = None) -> None:
        """Ends the request, well or with an error. Called exactly once."""
        self.ended = True
        self.error = error
        self.on_cancel = None
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(error)

    def follow(self, pending: Pending) -> None:
        """Starts `pending` and ends as it does; until then a cancellation goes to it."""
        if pending is DONE:
            self.finish()
            return
        if isinstance(pending, Deferred):
            self.on_cancel = pending.cancel
            pending.then(self.finish)
            return
        try:
            yielded = pending.send(None)
        except StopIteration:
            self.finish()
        except Exception as error:
            self.finish(error)
        else:
            task: asyncio.Task[None] = asyncio.get_running_loop().create_task(Continued(pending, yielded))
            self.on_cancel = task.cancel
            task.add_done_callback(self._followed)

    def _followed(self, task: "asyncio.Task[None]") -> None:
        self.finish(asyncio.CancelledError() if task.cancelled() else task.exception())

    def then(self, callback: Callable[[BaseException | None], object]) -> None:
        """Calls `callback(error or None)` when the request ends, at once if it has; in the order they were given."""
        if self.ended:
            callback(self.error)
        else:
            self._callbacks.append(callback)

    def cancel(self) -> None:
        """Asks for an early end."""
        if not self.ended and self.on_cancel is not None:
            self.on_cancel()

    def __await__(self) -> Generator[Any, Any, None]:
        cancelled = False
        while not self.ended:
            waiter = asyncio.get_running_loop().create_future()
            self.then(partial(_wake, waiter))
            try:
                yield from waiter
            except asyncio.CancelledError:
                cancelled = True
                self.cancel()
        if cancelled:
            raise asyncio.CancelledError
        if self.error is not None:
            raise self.error

    def _go_on(self) -> Generator[Any, Any, None]:
        if self._steps is None:
            self._steps = self.__await__()
        return self._steps

    def send(self, value: Any) -> Any:
        """As a coroutine's."""
        return self._go_on().send(value)

    def throw(self, *error: Any) -> Any:
        """As a coroutine's."""
        return self._go_on().throw(*error)

    def close(self) -> None:
        """As a coroutine's: nobody waits for it any more."""
        if self._steps is not None:
            self._steps.close()


def _wake(waiter: "asyncio.Future[None]", error: BaseException | None) -> None:
    if not waiter.done():
        waiter.set_result(None)


class Continued(Coroutine[Any, Any, None]):
    """The rest of a coroutine that was started eagerly and has yielded once: to be made a task, or awaited.

    A coroutine itself, so that a cancellation that comes before its task has run once reaches the request all the same.
    """

    __slots__ = ("_coroutine", "_started", "_yielded")

    def __init__(self, coroutine: Pending, yielded: object) -> None:
        self._coroutine = coroutine
        self._yielded = yielded
        self._started = False

    def send(self, value: Any) -> Any:
        """First what was yielded, then what the coroutine yields next."""
        if self._started:
            return self._coroutine.send(value)
        self._started = True
        return self._yielded

    def throw(self, *error: Any) -> Any:
        """Throws into the coroutine, started or not."""
        self._started = True
        return self._coroutine.throw(*error)

    def close(self) -> None:
        """Ends the coroutine."""
        self._coroutine.close()

    def __await__(self) -> "Continued":
        return self

    def __iter__(self) -> "Continued":
        return self

    def __next__(self) -> Any:
        return self.send(None)


def run_all(requests: Iterable[Pending]) -> Pending:
    """Runs requests side by side and ends when all of them have; then raises the first error, if any.

    Each is started eagerly, in order. Cancelling it cancels those that still wait, and waits for them.
    """
    waiting = [request for request in requests if request is not DONE]
    return _run_all(waiting) if waiting else DONE


async def _run_all(requests: list[Pending]) -> None:
    waiting: list[asyncio.Task[None]] = []
    first: BaseException | None = None
    for request in requests:
        try:
            yielded = request.send(None)
        except StopIteration:
            continue
        except Exception as error:
            first = first or error
            continue
        waiting.append(asyncio.get_running_loop().create_task(Continued(request, yielded)))
    try:
        for task in waiting:
            try:
                await task
            except Exception as error:
                first = first or error
    except asyncio.CancelledError:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        raise
    if first is not None:
        raise first


async def to_the_end(work: Pending) -> None:
    """Awaits `work`, such as closing a device, that must not stop half-way: a cancellation is raised when it has ended."""
    task = asyncio.ensure_future(work)
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        if not task.cancelled():
            task.exception()  # it was seen
        raise asyncio.CancelledError
    task.result()
