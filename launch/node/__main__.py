"""Supervise one node of a run: `python -P -m keepwarm.launch.node RUN_FOLDER --slots N ...`."""

import sys

from keepwarm.launch.node.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
