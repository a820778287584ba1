"""Make or check image folders: python tools/prepare_data.py --help"""

import sys

from vision_ssm.data.prepare import main

if __name__ == "__main__":
    sys.exit(main())
