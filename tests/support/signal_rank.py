"""A rank that writes its pid once it watches for signals, and ends as the trainer does when one asks for it."""

import os
import sys
import time
from pathlib import Path

from keepwarm.files import atomic_write
from keepwarm.trainer.loop.interrupt import Interrupt

if __name__ == "__main__":
    with Interrupt().watching() as interrupt:
        atomic_write(Path(sys.argv[1]) / "pid", str(os.getpid()).encode())
        while interrupt.received is None:
            time.sleep(0.02)
    sys.exit(130)
