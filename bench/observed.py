"""`nbdmap serve` that can be asked from outside what it holds: for each line on its stdin it writes one on its stdout.

    python -m bench.observed serve -q c.yaml        ->        {"tasks": 3, "objects": 51234, "threads": 2}
"""

import asyncio
import gc
import json
import sys
import threading

from nbdmap.cli.main import main


def _answer() -> None:
    for _ in sys.stdin:
        gc.collect()
        objects = gc.get_objects()
        tasks = sum(isinstance(one, asyncio.Task) and not one.done() for one in objects)
        print(json.dumps({"tasks": tasks, "objects": len(objects), "threads": threading.active_count() - 1}), flush=True)
        del objects


if __name__ == "__main__":
    threading.Thread(target=_answer, daemon=True, name="observer").start()
    sys.exit(main())
