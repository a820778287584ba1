"""Write the generated tables of README.md, or check that they are up to date.

    python tools/update_readme.py
    python tools/update_readme.py --check

The models are those of the model cards, which tools/make_cards.py counts: run that first.
"""

import argparse
import sys
from pathlib import Path

from vision_ssm.analysis import fill_tables

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table is out of date")
    arguments = parser.parse_args(argv)
    before = README.read_text()
    after = fill_tables(before, ROOT / "model_cards")
    if arguments.check:
        if before != after:
            print("README.md has tables that the registry no longer agrees with: run tools/update_readme.py")
        return int(before != after)
    README.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
