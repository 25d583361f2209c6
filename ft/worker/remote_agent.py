"""An agent of another node, from which a rank reads without being one of its workers."""

import socket
from dataclasses import dataclass, field
from pathlib import Path

from keepwarm.ft.errors import AgentError
from keepwarm.ft.transport.link import LinkLimits


@dataclass(frozen=True, kw_only=True)
class RemoteAgent:
    """Where an agent listens for other nodes, the size of its buckets, and how its job uses the network."""

    host: str
    port: int
    bucket_bytes: int
    limits: LinkLimits = field(default_factory=LinkLimits)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def connected(agent: Path | RemoteAgent, deadline: float) -> socket.socket:
    """Return a connection to an agent: to its socket on this node, or over the network. Raise `AgentError`."""
    try:
        if isinstance(agent, RemoteAgent):
            connection = socket.create_connection((agent.host, agent.port), timeout=deadline)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            connection.connect(str(agent))
        except OSError:
            connection.close()
            raise
        return connection
    except OSError as error:
        raise AgentError(f"{agent}: no agent answers: {error.strerror or error}") from error
