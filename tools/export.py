"""Write a model for other programs: ``python tools/export.py --help``."""

import sys

from vision_ssm.engine.export_command import export as main

if __name__ == "__main__":
    sys.exit(main())
