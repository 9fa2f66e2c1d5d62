"""``python -m lenet_ext`` is ``lenet-ext``; without arguments it prints what a bug report needs."""

from __future__ import annotations

import sys

from lenet_ext.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["info"]))
