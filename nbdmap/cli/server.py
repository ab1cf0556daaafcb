"""The server as a process: puts the parts together, runs them until a signal or its command ends, takes them apart.

Order of the start: addresses, disks and devices, admin socket, clients, pidfile, READY=1. Order of the end: no more
clients, requests in flight are answered, devices are flushed and closed; after STOP_SECONDS the process ends in any case.
A first SIGTERM or SIGINT ends in peace; another one, AGAIN_SECONDS later or more, at once. SIGHUP reloads; many of them in
a row are one.
"""

import asyncio
import gc
import logging
import os
import resource
import shutil
import signal
import ssl
import sys
import tempfile
import time
from pathlib import Path
from typing import Final, NoReturn

import uvloop

from nbdmap.cli import logs
from nbdmap.cli.captive import Captive
from nbdmap.cli.serve import Options, usage
from nbdmap.control import config as configuration
from nbdmap.control.admin_path import admin_path
from nbdmap.control.apply import Applied
from nbdmap.control.config import Config
from nbdmap.control.events import Events
from nbdmap.control.exports import Exports
from nbdmap.control.mapper import Mapper
from nbdmap.control.on_event import EventProgram
from nbdmap.control.paths import PathChecker
from nbdmap.control.rpc import AdminServer
from nbdmap.control.schema import TlsEntry, check_listen
from nbdmap.control.verbs import Verbs
from nbdmap.errors import InvalidArgument, NbdmapError, from_os_error
from nbdmap.nbd.constants import DEFAULT_PORT
from nbdmap.nbd.uri import Uri, parse_uri
from nbdmap.server.listener import Listener
from nbdmap.server.systemd import notify, take_descriptors
from nbdmap.server.tls import server_context
from nbdmap.targets import TARGETS

DEMO: Final = str(Path(__file__).parent.parent / "demo.yaml")
STOP_SECONDS: Final = 1.9
AGAIN_SECONDS: Final = 0.5
SWITCH_SECONDS: Final = 0.0005
"""How long a thread may hold the interpreter while the event loop waits for it."""
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

log = logging.getLogger(__name__)


def main(options: Options) -> int:
    """The exit status: 0, 1 for a failure, 2 for usage, or that of the command of --run."""
    level = logging.WARNING if options.quiet or options.command is not None else logging.INFO
    logs.set_up(options.log, logging.DEBUG if options.verbose else level)
    descriptors = take_descriptors(os.environ)
    if descriptors and (options.listen or options.command is not None):
        return usage("sockets come from systemd (LISTEN_FDS): --listen and --run do not go together with them")
    try:
        listen = tuple(check_listen(parse_uri(text)) for text in options.listen)
    except InvalidArgument as error:
        return usage(f"--listen {error.message}")
    try:
        config = read(options)
        if options.check:
            print(f"{config.origin.file}: good")
            return 0
        _raise_limit()
        sys.setswitchinterval(SWITCH_SECONDS)
        gc.freeze()  # the modules live as long as the process: walking through them takes 20 ms of each full collection
        return uvloop.run(Program(options, config, listen, descriptors).run())
    except NbdmapError as error:
        for line in error.message.split("\n"):
            log.error("%s", line)
        return 1


def read(options: Options) -> Config:
    """The configuration that the command line asks for. Raises BadConfig and what `configuration.load` raises."""
    tables = dict(options.tables)
    if options.content is not None:
        config = configuration.parse(options.content.encode(), os.path.join(os.getcwd(), "(command line)"), TARGETS)
    elif options.config is None and tables:
        config = configuration.from_command_line(tables, TARGETS)
    else:
        config = configuration.load(options.config or DEMO, TARGETS, tables)
    return config.read_only() if options.read_only else config


def _raise_limit() -> None:
    """As many open files as may be: each client and each disk is one."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:
        log.debug("RLIMIT_NOFILE: %s", error)


def _context(tls: TlsEntry | None) -> ssl.SSLContext | None:
    return server_context(tls.certificates, tls.verify_peer) if tls else None


def _ignore_signals() -> None:
    """What still comes finds a process that is ending anyway, and must not change its status."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _with_port(uri: Uri) -> str:
    """The URI with its port, even if that is the usual one."""
    return f"{uri}:{uri.port}" if uri.port == DEFAULT_PORT and not uri.socket else str(uri)


class Program:
    """One run of the server."""

    def __init__(self, options: Options, config: Config, listen: tuple[Uri, ...], descriptors: list[int]) -> None:
        self._options = options
        self._config = config
        self._descriptors = descriptors
        self._uris = listen or config.listen
        self._events = Events(time.time)
        self._mapper = Mapper(TARGETS, self._events)
        self._exports = Exports(self._mapper)
        self._applied = Applied(self._mapper, self._exports)
        self._checker = PathChecker(self._mapper, config.multipath.polling_interval)
        self._program = EventProgram(self._events, config.on_event)
        self._jobs: list[asyncio.Future[None]] = []
        self._listener = Listener(self._exports, _context(config.tls), config.tls is not None and config.tls.require)
        self._listener.poll.seconds = config.busy_poll_s
        self._admin: AdminServer | None = None
        self._captive: Captive | None = None
        self._private = ""  # a directory for the sockets of --run
        self._pidfile = ""
        self._stop = asyncio.Event()
        self._stop_asked = 0.0
        self._reload_due = asyncio.Event()

    async def run(self) -> int:
        """From the start to the end; the exit status. Raises NbdmapError when it cannot start."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:  # not the loop's handlers: to remove those restores SIG_DFL, if only for a moment
            signal.signal(number, lambda number, _: loop.call_soon_threadsafe(self._on_signal, number))
        stopped = asyncio.ensure_future(self._stop.wait())
        work = asyncio.ensure_future(self._work())
        status = 0
        try:
            await asyncio.wait((work, stopped), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                status = work.result()
        finally:
            stopped.cancel()
            status = await self._end(work, status)
            _ignore_signals()
        return status

    async def _work(self) -> int:
        """Starts, and reloads until it is cancelled, or until the command of --run has ended: its status."""
        await self._start()
        if self._captive is None:
            await self._reload_when_asked()
        reloading = asyncio.ensure_future(self._reload_when_asked())
        try:
            return await self._captive.wait()
        finally:
            reloading.cancel()

    # --- the start -----------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        if self._options.command is not None:
            self._private = tempfile.mkdtemp(prefix="nbdmap-")
            self._uris = (Uri(socket=os.path.join(self._private, "nbd.sock")),)
        if self._descriptors:
            await self._listener.adopt(self._descriptors, accept=False)
            log.info("listening on %d sockets from systemd", len(self._descriptors))
        else:
            for uri in self._uris:
                await self._listener.listen(uri, accept=False)
        await self._applied.start(self._config)
        await self._start_admin()
        self._program.socket = self._admin_path()
        self._jobs += [asyncio.ensure_future(self._checker.run()), asyncio.ensure_future(self._program.run())]
        await self._listener.accept()
        for uri in self._listener.uris:
            log.info("listening on %s", _with_port(uri))
        for name, description in self._exports.list():
            size = self._exports.find(name).size
            log.info("export %r: %d bytes%s", name, size, f", {description}" if description else "")
        logs.flush()  # whoever waits for the pidfile or READY=1 finds the addresses in the log
        if self._options.pidfile is not None:
            self._write_pidfile(self._options.pidfile)
        notify(os.environ, f"READY=1\nSTATUS={len(self._mapper.devices)} devices")
        if self._options.command is not None:
            self._captive = await Captive.start(self._options.command, self._listener.uris[0], self._admin_path())

    async def _start_admin(self) -> None:
        chosen = self._options.admin or self._config.admin
        if self._private and not chosen:
            chosen = os.path.join(self._private, "admin.sock")
        admin = AdminServer(Verbs(self._mapper, self._exports), chosen or admin_path())
        try:
            await admin.start()
        except NbdmapError as error:
            if chosen or "NBDMAP_SOCKET" in os.environ:
                raise
            log.warning("without an admin socket: %s", error.message)
            return
        self._admin = admin
        log.info("admin socket %s", admin.path)

    def _admin_path(self) -> str:
        return self._admin.path if self._admin else ""

    def _write_pidfile(self, path: str) -> None:
        """Whole or not at all."""
        path = os.path.abspath(path)
        part = f"{path}.{os.getpid()}"
        try:
            Path(part).write_text(f"{os.getpid()}\n")
            os.rename(part, path)
        except OSError as error:
            raise from_os_error(error, f"pidfile {path}") from error
        self._pidfile = path

    # --- reload --------------------------------------------------------------------------------------------------------

    async def _reload_when_asked(self) -> NoReturn:
        while True:
            await self._reload_due.wait()
            self._reload_due.clear()
            notify(os.environ, f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            try:
                await self._reload()
            except NbdmapError as error:
                for line in error.message.split("\n"):
                    log.error("%s", line)
                log.error("nothing was reloaded")
            except Exception:
                log.exception("the reload failed")
            notify(os.environ, f"READY=1\nSTATUS={len(self._mapper.devices)} devices")

    async def _reload(self) -> None:
        if self._options.config is None:
            log.info("there is no configuration file to reload")
            return
        config = await asyncio.to_thread(read, self._options)
        context = _context(config.tls)
        before = self._config
        required = [one.tls.require if one.tls else None for one in (config, before)]
        for key, changed in {
            "listen": config.listen != before.listen and not (self._options.listen or self._descriptors),
            "admin": config.admin != before.admin and not self._options.admin,
            "tls": required[0] != required[1],
        }.items():
            if changed:
                log.warning("%s has changed; that takes a restart", key)
        if context is not None and before.tls is not None:
            self._listener.renew(context)
        self._program.command = config.on_event
        self._checker.interval_s = config.multipath.polling_interval
        self._listener.poll.seconds = config.busy_poll_s
        problems = await self._applied.reload(config)
        self._config = config
        for problem in problems:
            log.error("%s", problem)
        log.info("reloaded %s: %s", config.origin.file, f"{len(problems)} problems" if problems else "all done")

    async def _end_jobs(self) -> None:
        for job in self._jobs:
            job.cancel()
        for problem in await asyncio.gather(*self._jobs, return_exceptions=True):
            if isinstance(problem, Exception):
                log.error("a background job failed", exc_info=problem)

    # --- the end -------------------------------------------------------------------------------------------------------

    def _on_signal(self, number: int) -> None:
        now = time.monotonic()
        if number == signal.SIGHUP:
            self._reload_due.set()
        elif not self._stop_asked:
            self._stop_asked = now
            self._stop.set()
        elif now - self._stop_asked >= AGAIN_SECONDS:
            self._vanish(128 + number)

    def _vanish(self, status: int) -> NoReturn:
        """Ends the process at once, whatever its threads wait for; leaves no file behind."""
        self._clear_up()
        logging.shutdown()
        os._exit(status)

    def _clear_up(self) -> None:
        if self._pidfile:
            Path(self._pidfile).unlink(missing_ok=True)
            self._pidfile = ""
        if self._private:
            shutil.rmtree(self._private, ignore_errors=True)

    async def _end(self, work: "asyncio.Future[int]", status: int) -> int:
        notify(os.environ, "STOPPING=1")
        gc.disable()  # with 10,000 clients, it took a third of the time that the end took
        try:
            async with asyncio.timeout(STOP_SECONDS):
                work.cancel()
                await asyncio.wait((work,))
                if self._captive is not None:
                    status = await self._captive.stop()
                parts = [self._listener.close()]
                if self._admin is not None:
                    parts.append(self._admin.close())
                await asyncio.gather(*parts)
                await self._end_jobs()
                await self._mapper.close()
        except NbdmapError as error:
            log.error("%s", error.message)
            status = status or 1
        except TimeoutError:
            log.error("not everything could be finished and flushed within %g s", STOP_SECONDS)
            self._vanish(status or 1)
        self._clear_up()
        return status
