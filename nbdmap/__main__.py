"""`python -m nbdmap`."""

import sys

from nbdmap.cli.main import main

sys.exit(main())
