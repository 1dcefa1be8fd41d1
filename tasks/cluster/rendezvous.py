"""Where the agents of a job form a group: torch elastic's rendezvous, on the signed store of the job.

The handler is torch's ``DynamicRendezvousHandler``, which unpickles the shared state; here the state comes from the
``AuthenticatedStore``, so only processes with the job's secret can write it. Each time that a group forms it gets
another number, under which its ranks find each other in the same store: no rank opens a store of its own.
"""

from __future__ import annotations

import os
from datetime import timedelta

from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout

from tasks.cluster.authenticated import AuthenticatedStore
from tasks.cluster.store import JobStore

#: Name of this rendezvous in torch's registry.
BACKEND = "tlq"
#: Environment variables of a rank: the job's store, its secret, and the number of the group.
STORE, SECRET, GROUP = "TLQ_STORE", "TLQ_STORE_SECRET", "TLQ_GROUP"

_GROUP_KEY, _GROUPS_KEY = "group", "tlq/groups"


class SignedBackend(C10dRendezvousBackend):
    """Torch's backend under the name of this rendezvous."""

    @property
    def name(self) -> str:
        return BACKEND


class JobRendezvous(DynamicRendezvousHandler):
    """Torch's handler, which also numbers the groups."""

    job: AuthenticatedStore

    def next_rendezvous(self) -> RendezvousInfo:
        """Join the next group. The ranks that this process starts find its number in ``TLQ_GROUP``."""
        joined = super().next_rendezvous()
        if joined.rank == 0:
            joined.store.set(_GROUP_KEY, str(self.job.add(_GROUPS_KEY, 1)))
        os.environ[GROUP] = joined.store.get(_GROUP_KEY).decode()
        return joined


def create(parameters: RendezvousParameters) -> RendezvousHandler:
    """Handler for a job's agent; the secret is in the environment, which other users cannot read."""
    store = JobStore.join(parameters.endpoint, os.environ[SECRET]).signed
    handler = JobRendezvous.from_backend(
        parameters.run_id,
        store,
        SignedBackend(store, parameters.run_id),
        parameters.min_nodes,
        parameters.max_nodes,
        parameters.local_addr,
        RendezvousTimeout(last_call=timedelta(seconds=1)),
        # An agent without a heartbeat for 8 seconds counts as dead; the others then continue without it.
        keep_alive_interval=1,
        keep_alive_max_attempt=8,
    )
    handler.job = store
    return handler


rendezvous_handler_registry.register(BACKEND, create)
