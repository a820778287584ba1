"""List the models of the library: ``python tools/list_models.py --help``."""

import sys

from vision_ssm.engine.commands import list_models_command as main

if __name__ == "__main__":
    sys.exit(main())
