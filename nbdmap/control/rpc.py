"""The admin RPC: JSON-RPC 2.0 over a Unix socket, one object a line, one method for each verb.

    -> {"jsonrpc": "2.0", "id": 1, "method": "create", "params": {"name": "lin", "table": "0 8 zero"}}
    <- {"jsonrpc": "2.0", "id": 1, "result": {"name": "lin", "uuid": "", ...}}
    <- {"jsonrpc": "2.0", "id": 1, "error": {"code": -16, "message": "...", "data": {"errno": 16, "errno_name": "EBUSY"}}}

Methods, parameters, types and defaults are those of `Verbs`, read off its signatures; `rpc.discover` lists them. Parameters
are named. A verb that fails answers with the code -errno. `events` acknowledges and then streams
{"method": "event", "params": {...}} until the client closes. The requests of one connection are done one after another;
a client that goes away cancels the one that is under way and those behind it.
"""

import asyncio
import errno
import fcntl
import inspect
import json
import logging
import os
import select
import socket
import stat
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import aclosing
from types import NoneType
from typing import Any, Final, cast, get_args, get_type_hints

from nbdmap.control.verbs import Verbs
from nbdmap.errors import Busy, InvalidArgument, NbdmapError, from_os_error

MAX_LINE: Final = 16 << 20
"""Bytes of a request: a table of some 300 000 lines."""
MAX_CONNECTIONS: Final = 32
MAX_PIPELINED: Final = 64
"""Requests read ahead of the one under way; a client that sends more is not read."""
CLOSED_CHECK: Final = 1.0
"""Seconds between looks whether a client is still there when no more can be read from it: it may have ended its sending
side only, or its requests may fill the queue."""

PARSE_ERROR: Final = -32700
INVALID_REQUEST: Final = -32600
METHOD_NOT_FOUND: Final = -32601
INVALID_PARAMS: Final = -32602
INTERNAL_ERROR: Final = -32603
TOO_MANY_CONNECTIONS: Final = -32000

Message = dict[str, Any]
_TYPE_NAMES: Final = {str: "a string", int: "an integer", bool: "true or false", NoneType: "null"}
_log = logging.getLogger(__name__)


class RpcError(Exception):
    """A request that gets an error object for an answer."""

    def __init__(self, code: int, message: str, data: Message | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.data = data

    def answer(self) -> Message:
        """The error object."""
        error: Message = {"code": self.code, "message": self.message}
        return {**error, "data": self.data} if self.data else error


class Method:
    """One verb: its parameters with their types, and how to call it."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name
        self.function = function
        self.summary = (inspect.getdoc(function) or "").partition("\n\n")[0].replace("\n", " ")
        hints = get_type_hints(function)
        self.types: dict[str, tuple[type, ...]] = {}
        self.defaults: Message = {}
        for parameter in inspect.signature(function).parameters.values():
            hint = hints[parameter.name]
            self.types[parameter.name] = get_args(hint) or (hint,)
            if parameter.default is not parameter.empty:
                self.defaults[parameter.name] = parameter.default

    def check(self, params: object) -> Message:
        """`params`, if the method can be called with them. Raises RpcError naming the parameter otherwise."""
        if not isinstance(params, dict):
            raise RpcError(INVALID_PARAMS, f"{self.name}: params must be an object with the names of parameters")
        for key, value in params.items():
            allowed = self.types.get(key)
            if allowed is None:
                known = ", ".join(self.types) or "none"
                raise RpcError(INVALID_PARAMS, f"{self.name}: unknown parameter {key!r} (there are: {known})")
            if type(value) not in allowed:
                wanted = " or ".join(_TYPE_NAMES[one] for one in allowed)
                raise RpcError(INVALID_PARAMS, f"{self.name}: parameter {key!r} must be {wanted}")
            if isinstance(value, str) and not _is_text(value):
                raise RpcError(INVALID_PARAMS, f"{self.name}: parameter {key!r} is not valid UTF-8")
        for key in self.types:
            if key not in params and key not in self.defaults:
                raise RpcError(INVALID_PARAMS, f"{self.name}: parameter {key!r} is missing")
        return params

    def describe(self) -> Message:
        """Name, summary and parameters, for `rpc.discover`."""
        parameters = [
            {
                "name": name,
                "types": [{NoneType: "null", str: "string", int: "integer", bool: "boolean"}[one] for one in types],
                **({"default": self.defaults[name]} if name in self.defaults else {"required": True}),
            }
            for name, types in self.types.items()
        ]
        return {"name": self.name, "summary": self.summary, "params": parameters}


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can say half a surrogate pair
        return False
    return True


class Methods:
    """The methods of one Verbs."""

    def __init__(self, verbs: Verbs) -> None:
        self._verbs = verbs
        self.by_name = {
            name: Method(name, getattr(verbs, name))
            for name, _ in inspect.getmembers(type(verbs), inspect.isfunction)
            if not name.startswith("_")
        }

    def find(self, name: object) -> Method:
        """The method called `name`. Raises RpcError."""
        method = self.by_name.get(name) if isinstance(name, str) else None
        if method is None:
            raise RpcError(METHOD_NOT_FOUND, f"no method {name!r}"[:200])
        return method

    async def call(self, name: object, params: object) -> object:
        """The result of a verb as plain data. Raises RpcError; never another exception, but CancelledError."""
        if name == "rpc.discover":
            return [method.describe() for method in self.by_name.values()]
        method = self.find(name)
        checked = method.check(params)
        try:
            return await cast("Coroutine[Any, Any, object]", method.function(**checked))
        except NbdmapError as error:
            raise failure(error) from error
        except Exception as error:
            _log.exception("the verb %s failed", method.name)
            raise RpcError(INTERNAL_ERROR, f"internal error: {type(error).__name__}") from error


def failure(error: NbdmapError) -> RpcError:
    """What a verb's failure looks like to the client."""
    data = {"errno": error.errno, "errno_name": errno.errorcode.get(error.errno, str(error.errno))}
    for key in ("stage", "number"):
        if value := getattr(error, key, ""):
            data[key] = value
    return RpcError(-error.errno, error.message, data)


class AdminServer:
    """Listens on a Unix socket of mode 0600 and answers requests for `verbs`."""

    def __init__(self, verbs: Verbs, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._methods = Methods(verbs)
        self._server: asyncio.Server | None = None
        self._inode: tuple[int, int] = (0, 0)
        self._connections: set[asyncio.Task[object]] = set()

    async def start(self) -> None:
        """Starts to listen. Raises Busy when another server does already, and NbdmapError when it cannot."""
        listening = bind(self.path)
        status = os.stat(self.path)
        self._inode = status.st_dev, status.st_ino
        self._server = await asyncio.start_unix_server(self._connected, sock=listening, limit=MAX_LINE)

    async def close(self) -> None:
        """Stops to listen, cancels what is under way and takes the socket away."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        connections = list(self._connections)
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        try:
            status = os.lstat(self.path)
            if (status.st_dev, status.st_ino) == self._inode:
                os.unlink(self.path)
        except FileNotFoundError:
            pass

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        crowded = len(self._connections) >= MAX_CONNECTIONS
        self._connections.add(task)
        try:
            if crowded:
                error = RpcError(TOO_MANY_CONNECTIONS, f"{MAX_CONNECTIONS} clients are connected, as many as may be")
                writer.write(_line({"jsonrpc": "2.0", "id": None, "error": error.answer()}))
            else:
                await _Connection(self._methods, reader, writer).run()
        except asyncio.CancelledError:
            pass  # `close`; nobody awaits this task but it
        except Exception:
            _log.exception("an admin connection failed")
        finally:
            self._connections.discard(task)
            writer.close()


class _Connection:
    """One client: reads requests into a short queue while a worker does them in order."""

    def __init__(self, methods: Methods, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._methods = methods
        self._reader = reader
        self._writer = writer
        self._lines: asyncio.Queue[bytes | RpcError | None] = asyncio.Queue(MAX_PIPELINED)

    async def run(self) -> None:
        """Returns when the client has closed, or has sent what ends a connection."""
        async with asyncio.TaskGroup() as tasks:
            worker = tasks.create_task(self._work())
            receiver = tasks.create_task(self._receive())
            waited: set[asyncio.Task[None]] = {worker, receiver}
            while not worker.done() and not _hung_up(self._writer):
                _, waited = await asyncio.wait(waited, timeout=CLOSED_CHECK, return_when=asyncio.FIRST_COMPLETED)
            worker.cancel()
            receiver.cancel()

    async def _receive(self) -> None:
        """Queues lines until the client ends its side; None, or the error that ends the connection, is the last."""
        last: RpcError | None = None
        try:
            while line := await self._reader.readline():
                if line.strip():
                    await self._lines.put(line)
        except ValueError:  # readline's for a line beyond the limit
            last = RpcError(INVALID_REQUEST, f"a request is longer than {MAX_LINE} bytes")
        except ConnectionError:
            pass
        await self._lines.put(last)

    async def _work(self) -> None:
        """Answers what is queued."""
        try:
            while (line := await self._lines.get()) is not None:
                if isinstance(line, RpcError):
                    await self._send({"id": None, "error": line.answer()})
                    return
                await self._answer(line)
        except ConnectionError:
            pass

    async def _answer(self, line: bytes) -> None:
        number: object = None
        wanted = True
        try:
            request = _parse(line)
            number = request.get("id")
            wanted = "id" in request
            if request.get("method") == "events":
                self._methods.find("events").check(request.get("params", {}))
                return await self._stream(number)
            result = await self._methods.call(request.get("method"), request.get("params", {}))
        except RpcError as error:
            if wanted:
                await self._send({"id": number, "error": error.answer()})
            return
        if wanted:
            await self._send({"id": number, "result": result})

    async def _stream(self, number: object) -> None:
        """Acknowledges and sends events until the client goes; what happens after the acknowledgement is sent."""
        events = cast("AsyncIterator[Mapping[str, str]]", self._methods.by_name["events"].function())
        async with aclosing(events):  # type: ignore[type-var]
            first = asyncio.ensure_future(anext(events))
            try:
                await asyncio.sleep(0)  # it subscribes
                await self._send({"id": number, "result": {}})
                await self._send({"method": "event", "params": dict(await first)})
            finally:
                first.cancel()
            async for event in events:
                await self._send({"method": "event", "params": dict(event)})

    async def _send(self, message: Message) -> None:
        self._writer.write(_line({"jsonrpc": "2.0", **message}))
        await self._writer.drain()


def _line(message: Message) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def _parse(line: bytes) -> Message:
    """The request object of a line. Raises RpcError."""
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RpcError(PARSE_ERROR, f"not JSON: {error}"[:200]) from None
    if not isinstance(request, dict) or request.get("jsonrpc", "2.0") != "2.0":
        raise RpcError(INVALID_REQUEST, "a request is one JSON-RPC 2.0 object")
    if not isinstance(request.get("id"), str | int | float | None):
        raise RpcError(INVALID_REQUEST, "an id is a string, a number or null")
    if not isinstance(request.get("method"), str):
        raise RpcError(INVALID_REQUEST, "the method is missing")
    return request


def _hung_up(writer: asyncio.StreamWriter) -> bool:
    """Whether the client has closed, rather than only ended its sending side."""
    descriptor = writer.get_extra_info("socket").fileno()
    if writer.is_closing() or descriptor < 0:
        return True
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0))


def bind(path: str) -> socket.socket:
    """A bound Unix socket of mode 0600 at `path`; a stale one is replaced, its directory is made.

    Raises Busy when somebody listens there, and InvalidArgument or IoFailed when it cannot be.
    """
    directory = os.path.dirname(path) or "."
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        guard = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise from_os_error(error, f"the admin socket's directory {directory}") from error
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        fcntl.flock(guard, fcntl.LOCK_EX)  # between the look at a stale socket and its removal nobody else does the same
        os.fchmod(listening.fileno(), 0o600)  # the file gets this mode, whatever the umask leaves of it
        _remove_stale(path)
        listening.bind(path)
    except BaseException as error:
        listening.close()
        if isinstance(error, OSError):
            if error.errno is None:
                raise InvalidArgument(f"the admin socket's path {path} is too long") from None
            raise from_os_error(error, f"the admin socket {path}") from error
        raise
    finally:
        os.close(guard)
    return listening


def _remove_stale(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise Busy(f"{path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:  # its backlog is full: somebody is there
            pass
    raise Busy(f"another nbdmap listens on {path}")
