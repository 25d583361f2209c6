"""What a commit, an epoch and the loss of a node cost jobs of many nodes, by simulation in virtual time.

python -m tests.bench.size --protocol 64,1024 --agents 64
"""

import argparse
import os

from tests.simulated.size import names, of_agents, of_protocol, row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", default="64,256,1024", help="members of jobs of the pure protocol")
    parser.add_argument("--agents", default="64", help="members of jobs of real agents")
    options = parser.parse_args()
    print("| what | " + " | ".join(names()) + " |", "|---" * (len(names()) + 1) + "|", sep="\n")
    for what, make, counts in (
        ("protocol", of_protocol, options.protocol),
        ("agents", of_agents, options.agents),
    ):
        for count in filter(None, counts.split(",")):
            print(row(what, make(int(count))), flush=True)
    print(f"load of this machine: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
