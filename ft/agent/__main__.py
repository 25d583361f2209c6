"""Run the snapshot agent of one node: `python -P -m keepwarm.ft.agent DESCRIPTORS CONFIG.json`."""

import sys

from keepwarm.ft.agent.agent import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
