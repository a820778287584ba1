"""Classify images: ``python tools/predict.py --help``."""

import sys

from vision_ssm.engine.commands import predict as main

if __name__ == "__main__":
    sys.exit(main())
