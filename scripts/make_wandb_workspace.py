"""Saves a prepared workspace (sections, axes, growth marks) in a Weights & Biases project.

    python scripts/make_wandb_workspace.py ENTITY PROJECT

Needs the extra `workspaces` and a W&B login. It makes a new view each time and changes no other.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from growkit.train.loggers.workspace import layout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entity", help="user or team")
    parser.add_argument("project")
    arguments = parser.parse_args()
    print(layout(arguments.entity, arguments.project).save().url)


if __name__ == "__main__":
    main()
