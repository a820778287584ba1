"""Evaluate a checkpoint on the test data of a config: ``python tools/test.py --help``."""

import sys

from vision_ssm.engine.commands import test as main

if __name__ == "__main__":
    sys.exit(main())
