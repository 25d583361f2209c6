"""Agree on a unique ID for this start of all ranks, through a store that survives restarts.

torchrun keeps its store, and with it the keys of earlier starts. Restart counts do not tell starts apart: each node's
agent counts for itself, and one that replaces a lost node begins at zero.
"""

import time
import uuid
from datetime import timedelta

from torch._C._distributed_c10d import Store
from torch.distributed import DistError

from keepwarm.trainer.errors import TrainerError

STORE_POLL_INTERVAL_S = 0.005


def agree(store: Store, rank: int, size: int, deadline: timedelta) -> str:
    """Return an ID that is the same on all ranks and differs between starts. Collective; earlier ranks must be dead.

    Rank 0 answers each greeting with the ID and returns when all ranks have confirmed it: greetings of earlier starts
    are answered too, but never confirmed.

    Raises:
        TrainerError: ranks did not arrive within the deadline; on rank 0 it names them.
    """
    if rank:
        me = uuid.uuid4().hex
        store.set(f"keepwarm/hello/{rank}", me)
        try:
            store.wait([f"keepwarm/name/{me}"], deadline)
        except DistError as error:
            raise TrainerError(f"rank {rank}: waited {deadline} for rank 0 to start") from error
        name = store.get(f"keepwarm/name/{me}").decode()
        store.set(f"keepwarm/{name}/{rank}", "")
        return name
    name = uuid.uuid4().hex
    answered: dict[int, str] = {}
    missing, end = list(range(1, size)), time.monotonic() + deadline.total_seconds()
    while missing := [one for one in missing if not store.check([f"keepwarm/{name}/{one}"])]:
        for one in missing:
            if store.check([f"keepwarm/hello/{one}"]):
                who = store.get(f"keepwarm/hello/{one}").decode()
                if answered.get(one) != who:
                    store.set(f"keepwarm/name/{who}", name)
                    answered[one] = who
        if time.monotonic() > end:
            raise TrainerError(f"rank 0: waited {deadline} for ranks {', '.join(map(str, missing))} to start")
        time.sleep(STORE_POLL_INTERVAL_S)
    return name
