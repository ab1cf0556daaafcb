"""Compiles the modules of the data path with mypyc when NBDMAP_COMPILE=1; without it the package is pure Python.

The two behave the same, and the same tests run on both (`make test-compiled`). What is compiled is what one request passes
through; it was chosen by measurement, see bench/README.md.

In these modules no `except` or `finally` clause may await: two tests of a compiled server crashed until that was so, probably
because mypyc leaves the exception that is being handled in the thread's state while the coroutine waits.
"""

import os

from setuptools import setup

COMPILED = [
    "nbdmap/units.py",
    "nbdmap/block/io.py",
    "nbdmap/block/device.py",
    "nbdmap/block/file.py",
    "nbdmap/dm/target.py",
    "nbdmap/dm/table.py",
    "nbdmap/dm/device.py",
    "nbdmap/nbd/constants.py",
    "nbdmap/nbd/transmission.py",
    "nbdmap/server/door.py",
    "nbdmap/server/serving.py",
    "nbdmap/ciphers/cipher.py",
    "nbdmap/ciphers/tweaks.py",
    "nbdmap/ciphers/xts.py",
    "nbdmap/targets/crypt/engine.py",
    "nbdmap/targets/crypt/target.py",
    "nbdmap/targets/linear.py",
    "nbdmap/targets/striped.py",
    "nbdmap/targets/thin/thin.py",
]

if os.environ.get("NBDMAP_COMPILE") == "1":
    from mypyc.build import mypycify

    setup(ext_modules=mypycify(COMPILED, opt_level="3", debug_level="0"))
else:
    setup()
