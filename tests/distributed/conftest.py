"""What the tests of this folder share."""

from __future__ import annotations

import sys
from pathlib import Path

# importlib mode finds no modules beside the tests; the small networks are those of the methods' tests.
TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / room) for room in ("distributed", "methods", "nn")]
