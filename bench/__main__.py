"""``python -m fastmkd.bench``: the same as ``fastmkd bench``, without the command line's dependencies."""

import sys

from .runner import main

sys.exit(main())
