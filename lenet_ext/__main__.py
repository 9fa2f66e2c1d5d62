"""``python -m lenet_ext`` is ``lenet-ext``."""

from __future__ import annotations

import sys

from lenet_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
