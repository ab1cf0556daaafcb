"""`python -m tests.soak SECONDS [--seed N]`: kills the server again and again, and says what was lost.

The exit status is 1 if anything was.
"""

import argparse
import sys
import time

from tests.soak.soak import CONFIG, soak
from tests.support.server import serving


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__, allow_abbrev=False)
    parser.add_argument("seconds", type=float, nargs="?", default=60.0)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="default: the time")
    words = parser.parse_args()
    print(f"seed {words.seed}, {words.seconds:g} s", flush=True)
    with serving(CONFIG) as server:
        result = soak(server, server.directory, words.seed, words.seconds)
    print(
        f"{result.kills} times killed, {result.writes:,} writes and {result.flushes:,} flushes answered, "
        f"{result.compared:,} sectors compared, {result.unfinished:,} of them showed a write that no flush had covered, "
        f"{len(result.lost)} were wrong"
    )
    print("\n".join(result.lost[:50]))
    return 1 if result.lost else 0


if __name__ == "__main__":
    sys.exit(main())
