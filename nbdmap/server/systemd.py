"""What systemd passes and wants to hear: socket activation (sd_listen_fds) and readiness (sd_notify)."""

import os
import socket
from collections.abc import MutableMapping
from typing import Final

FIRST_DESCRIPTOR: Final = 3
NOTIFY_SECONDS: Final = 0.5
"""How long a service manager may take to make room for what it is told."""


def take_descriptors(environment: MutableMapping[str, str]) -> list[int]:
    """The sockets that were passed to this process, and takes the variables away so that no child believes them.

    Ends behind the first that is not open: it is returned, so that whoever listens on it can say which one it is.
    """
    count, pid = environment.pop("LISTEN_FDS", ""), environment.pop("LISTEN_PID", "")
    environment.pop("LISTEN_FDNAMES", None)
    descriptors: list[int] = []
    if pid != str(os.getpid()) or not (count.isascii() and count.isdigit()):
        return descriptors
    for descriptor in range(FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + int(count)):
        descriptors.append(descriptor)
        try:
            os.set_inheritable(descriptor, False)
        except OSError:
            break
    return descriptors


def notify(environment: MutableMapping[str, str], state: str) -> None:
    """Tells the service manager, if there is one, a state such as "READY=1"."""
    path = environment.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
        out.settimeout(NOTIFY_SECONDS)
        try:
            out.connect("\0" + path[1:] if path[0] == "@" else path)
            out.send(state.encode())
        except OSError:
            pass  # as sd_notify: a service manager that does not listen is no failure of ours
