"""Look at scans, models and runs: ``python tools/visualize.py --help``."""

import sys

from vision_ssm.engine.visualize_command import visualize as main

if __name__ == "__main__":
    sys.exit(main())
