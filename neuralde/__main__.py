"""`python -m neuralde`: the same program as `neuralde`."""

import sys

from .experiments.cli import main

sys.exit(main())
