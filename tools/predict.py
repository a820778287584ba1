"""Classify images, segment them, or find objects or poses: ``python tools/predict.py --help``."""

import sys

from vision_ssm.engine.predict_command import predict as main

if __name__ == "__main__":
    sys.exit(main())
