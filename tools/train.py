"""Train a model from a config: ``python tools/train.py --help``."""

import sys

from vision_ssm.engine.commands import train as main

if __name__ == "__main__":
    sys.exit(main())
