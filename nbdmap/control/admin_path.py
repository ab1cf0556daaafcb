"""Where the admin socket is: one rule for the server and for the command line. Imports nothing that is slow.

    $NBDMAP_SOCKET, else /run/nbdmap/admin.sock for root, else $XDG_RUNTIME_DIR/nbdmap/admin.sock
"""

import os
from collections.abc import Mapping


def admin_path(environment: Mapping[str, str] = os.environ, user: int | None = None) -> str:
    """The path of the admin socket when none is named; `user` is a uid, the present one by default.

    >>> admin_path({"XDG_RUNTIME_DIR": "/run/user/7"}, user=7)
    '/run/user/7/nbdmap/admin.sock'
    """
    if path := environment.get("NBDMAP_SOCKET"):
        return path
    user = os.geteuid() if user is None else user
    if user == 0:
        return "/run/nbdmap/admin.sock"
    return os.path.join(environment.get("XDG_RUNTIME_DIR") or f"/run/user/{user}", "nbdmap", "admin.sock")
