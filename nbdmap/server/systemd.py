"""What systemd passes and wants to hear: socket activation (sd_listen_fds) and readiness (sd_notify)."""

import os
import socket
from collections.abc import MutableMapping
from typing import Final

FIRST_DESCRIPTOR: Final = 3


def take_descriptors(environment: MutableMapping[str, str]) -> list[int]:
    """The sockets that were passed to this process, and takes the variables away so that no child believes them."""
    count, pid = environment.pop("LISTEN_FDS", ""), environment.pop("LISTEN_PID", "")
    environment.pop("LISTEN_FDNAMES", None)
    if not count.isdigit() or pid != str(os.getpid()):
        return []
    descriptors = list(range(FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + int(count)))
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    return descriptors


def notify(environment: MutableMapping[str, str], state: str) -> None:
    """Tells the service manager, if there is one, a state such as "READY=1"."""
    path = environment.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
        try:
            out.connect("\0" + path[1:] if path[0] == "@" else path)
            out.send(state.encode())
        except OSError:
            pass  # as sd_notify: a service manager that does not listen is no failure of ours
