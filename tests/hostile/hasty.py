"""`python -m nbdmap` with another deadline for handshakes, so that tests need not wait for the real one."""

import os
import sys

from nbdmap.cli.main import main
from nbdmap.server import connection

connection.HANDSHAKE_SECONDS = float(os.environ["HANDSHAKE_SECONDS"])  # type: ignore[misc]
if __name__ == "__main__":
    sys.exit(main())
