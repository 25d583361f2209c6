"""Sessions with the processes of this node: workers that own part of the buffers, supervisors and observers.

Processes connect to a 0600 Unix socket in a 0700 folder, must run as the same user and must know the job's secret. A
worker that disconnects without a farewell may still write to the buffers it has mapped, so it counts as lost only when
its process is known to be dead. A process that outlives its socket is killed.
"""

import selectors
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import msgspec

from keepwarm.ft.agent.log import Journal
from keepwarm.ft.discovery.status import Status
from keepwarm.ft.errors import AgentError
from keepwarm.ft.memory.buffers import Memory
from keepwarm.ft.memory.shared_memory import Holder
from keepwarm.ft.protocol.messages import END_OF_JOB, Attach, Attached, Farewell, Wire, WorkerMessage
from keepwarm.ft.protocol.state import Geometry
from keepwarm.ft.transport.channel import Channel, decoder_of
from keepwarm.ft.transport.link import Credentials, FarEnd, Link
from keepwarm.ft.transport.listener import Listener, Strangers

ROLES = frozenset({"worker", "supervisor", "onlooker"})
WORKER_EXIT_GRACE_S = 5.0
"""Grace period of a process whose socket has closed before it is killed, in seconds."""
decode = decoder_of(WorkerMessage | Status)


class Session:
    """One process connected to the socket."""

    def __init__(self, link: Link, holder: Holder) -> None:
        self.link, self.holder = link, holder
        self.attach: Attach | None = None
        self.attached = self.released = False
        """`released`: the process has declared that it no longer touches the buffers."""
        self.left_at: float | None = None
        self.waits_for_epoch: int | None = None

    @property
    def role(self) -> str:
        return self.link.theirs.role if self.link.theirs is not None and self.link.open else ""


class SessionHandler(Protocol):
    """Receives session events. Called from the thread that drives the selector."""

    @property
    def journal(self) -> Journal: ...
    @property
    def clock(self) -> Callable[[], float]: ...

    def configured(self, geometry: Geometry) -> Attached:
        """Handle a complete layout of workers. Return the reply for all of them, except for the offset of each part."""
        ...

    def worker_lost(self, worker: int) -> None:
        """Handle a worker that can no longer write to any buffer."""
        ...

    def worker_message(self, session: Session, message: Wire) -> None: ...

    def session_drained(self, link: Link) -> None:
        """Handle a link with little left to send, which can take more bulk data."""
        ...

    def session_lost(self, link: Link) -> None: ...


class WorkerSessions:
    """Accepts processes, tracks which worker each one is and reports to its handler."""

    def __init__(
        self, selector: selectors.BaseSelector, path: Path, credentials: Credentials, memory: Memory,
        handler: SessionHandler, former: Mapping[int, Holder],
    ) -> None:  # fmt: skip
        """Create and listen on the Unix socket `path`. Workers that attach receive the buffers of `memory`.

        `former` are workers of the last agent, which may still write to the memory until they attach here or die.
        """
        self._selector, self._path, self._credentials = selector, path, credentials
        self._memory, self._handler, self._journal, self._clock = memory, handler, handler.journal, handler.clock
        self.by_link: dict[Link, Session] = {}
        self._leaving: list[Session] = []
        self._former = dict(former)
        for holder in self._former.values():
            selector.register(holder.fileno(), selectors.EVENT_READ, _DeathWatch(self, self._clock))
        self.last_seen = self._clock()
        self.ended = False
        """Set once all workers have reported the end of the job."""
        path.unlink(missing_ok=True)
        self._strangers = Strangers()
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        listening.bind(str(path))
        path.chmod(0o600)
        listening.listen(64)
        self._listener = Listener(listening, selector, self)

    # ---- the selector

    def ready(self, mask: int) -> None:
        accepted = self._listener.accept()
        if accepted is None:
            return
        connection, _ = accepted
        try:
            holder = Holder(connection)
        except (AgentError, OSError) as error:
            connection.close()
            self._journal.write("warning", "refused a process on the socket", reason=str(error))
            return
        far = FarEnd(label=f"process {holder.pid}", dialled=False)
        try:
            channel = Channel(connection, decode, self._memory.shape.bucket_bytes)
            link = Link(channel, self._selector, self, self._credentials, far)
        except OSError:
            connection.close()
            holder.close()
            return
        self.by_link[link] = Session(link, holder)
        self._strangers.add(link, f"process {holder.pid}")

    def tick(self, now: float) -> None:
        self._listener.tick()
        for link in list(self.by_link):
            link.tick(now)
        for session in list(self._leaving):
            if not session.holder.alive:
                self._reaped(session)
            elif session.left_at is not None and now - session.left_at > WORKER_EXIT_GRACE_S:
                self._journal.write(
                    "warning", "killing a worker that left its socket and stayed", pid=session.holder.pid
                )
                session.holder.kill()
                session.left_at = now
        for worker in [worker for worker, holder in self._former.items() if not holder.alive]:
            self._former_is_done(worker)
            self._attach_all()
        if (
            self.workers
            or self._leaving
            or self._former
            or any(session.role == "supervisor" for session in self.by_link.values())
        ):
            self.last_seen = now

    # ---- Handler

    def connected(self, link: Link) -> None:
        self._strangers.discard(link)
        self.last_seen = self._clock()

    def refused(self, link: Link, reason: str) -> None:
        session = self.by_link.pop(link)
        self._strangers.discard(link)
        if link.channel.received:  # a connection that sent nothing was only a liveness probe
            self._journal.write("warning", "refused a process on the socket", pid=session.holder.pid, reason=reason)
        session.holder.close()

    def lost(self, link: Link, reason: str) -> None:
        session = self.by_link.pop(link)
        self._handler.session_lost(link)
        if session.attach is None or session.released:
            if session.attach is not None and session.attached:
                self._handler.worker_lost(session.attach.worker)
            session.holder.close()
            self._attach_all()
            return
        session.left_at = self._clock()
        self._leaving.append(session)
        self._selector.register(session.holder.fileno(), selectors.EVENT_READ, _DeathWatch(self, self._clock))
        self._journal.write(
            "info", "a worker has gone", worker=session.attach.worker, pid=session.holder.pid, reason=reason
        )

    def target(self, link: Link, message: Wire, size: int) -> memoryview | None:
        return None

    def received(self, link: Link, message: Wire, payload: memoryview | None) -> None:
        session = self.by_link[link]
        if isinstance(message, Attach):
            self._attach(session, message)
        elif isinstance(message, Farewell):
            session.released = True
            if message.reason == END_OF_JOB:
                self.ended = True
            link.close(message.reason)
        else:
            self._handler.worker_message(session, message)

    def drained(self, link: Link) -> None:
        self._handler.session_drained(link)

    # ---- workers

    @property
    def workers(self) -> dict[int, Session]:
        """Attached workers by worker number."""
        return {g.attach.worker: g for g in self.by_link.values() if g.attach is not None and g.attached}

    @property
    def pids(self) -> dict[int, int]:
        """Processes that may have mapped the memory, by worker number."""
        here = {worker: session.holder.pid for worker, session in self.workers.items()}
        gone = {g.attach.worker: g.holder.pid for g in self._leaving if g.attach is not None and g.attached}
        return {**{worker: holder.pid for worker, holder in self._former.items()}, **gone, **here}

    def send(self, worker: int, message: Wire) -> None:
        """Send a message to a worker. Do nothing if it has gone."""
        session = self.workers.get(worker)
        if session is not None:
            session.link.send(message)

    def send_all(self, message: Wire) -> None:
        for worker in self.workers:
            self.send(worker, message)

    def close(self) -> None:
        self._listener.close()
        for link in list(self.by_link):
            link.close("the agent is leaving")
        for session in self._leaving:
            self._selector.unregister(session.holder.fileno())
            session.holder.close()
        for holder in self._former.values():
            self._selector.unregister(holder.fileno())
            holder.close()
        self._path.unlink(missing_ok=True)

    def _attach(self, session: Session, attach: Attach) -> None:
        buffer_buckets, run = self._memory.shape.buckets, self._credentials.hello.run
        reason = ""
        if session.role != "worker":
            reason = f"a {session.role} cannot attach"
        elif attach.run != run:
            reason = f"this agent serves run {run!r}, not {attach.run!r}"
        elif attach.worker >= attach.workers:
            reason = f"worker {attach.worker} of {attach.workers} cannot be"
        elif attach.buckets > buffer_buckets:
            reason = (
                f"worker {attach.worker} needs {attach.buckets} buckets of {self._memory.shape.bucket_bytes} bytes, "
                f"a buffer has {buffer_buckets}"
            )
        if reason:
            session.link.send(Farewell(reason=reason))
            return
        session.attach, session.attached, self.ended = attach, False, False
        for other in [*self.by_link.values(), *self._leaving]:
            if other is not session and other.attach is not None and other.attach.worker == attach.worker:
                self._journal.write(
                    "info", "a new process takes a worker's place", worker=attach.worker, pid=other.holder.pid
                )
                other.holder.kill()
        for worker, holder in list(self._former.items()):
            if holder.pid == session.holder.pid:
                self._former_is_done(worker)
            elif worker == attach.worker:
                self._journal.write("info", "a new process takes a worker's place", worker=worker, pid=holder.pid)
                holder.kill()
        self._attach_all()

    def _former_is_done(self, worker: int) -> None:
        """Handle a worker of the last agent that can no longer write to what that agent granted."""
        holder = self._former.pop(worker)
        self._selector.unregister(holder.fileno())
        holder.close()
        self._handler.worker_lost(worker)

    def _attach_all(self) -> None:
        """Attach the workers of a layout once all of them have connected and all previous ones are dead."""
        if any(session.attach is not None for session in self._leaving):
            return
        here = [session for session in self.by_link.values() if session.attach is not None]
        fresh = [session for session in here if not session.attached]
        if not fresh:
            return
        wanted = fresh[-1].attach
        assert wanted is not None
        group = {
            g.attach.worker: g
            for g in here
            if g.attach is not None and (g.attach.layout, g.attach.workers) == (wanted.layout, wanted.workers)
        }
        if len(group) < wanted.workers or self._former.keys() & group.keys():
            return
        ordered = [group[worker] for worker in range(wanted.workers)]
        parts = tuple(g.attach.buckets for g in ordered if g.attach is not None)
        buffer_buckets = self._memory.shape.buckets
        if sum(parts) > buffer_buckets:
            for session in ordered:
                reason = f"the workers need {' + '.join(map(str, parts))} buckets, a buffer has {buffer_buckets}"
                session.link.send(Farewell(reason=reason))
                session.attach = None
            return
        geometry = Geometry(layout=wanted.layout, parts=parts, chunk=self._memory.shape.chunk)
        answer = self._handler.configured(geometry)
        descriptors = [buffer.descriptor for buffer in self._memory.data]
        for worker, session in enumerate(ordered):
            if not session.attached:
                session.attached = True
                session.link.send(
                    msgspec.structs.replace(answer, first=geometry.first(worker)), descriptors=descriptors
                )

    def _reaped(self, session: Session) -> None:
        """Release the session of a dead process, which can no longer write to its buffers."""
        self._leaving.remove(session)
        self._selector.unregister(session.holder.fileno())
        session.holder.close()
        if session.attached and session.attach is not None:
            self._handler.worker_lost(session.attach.worker)
        self._attach_all()


class _DeathWatch:
    """Selector handler for the death of an awaited process."""

    def __init__(self, sessions: WorkerSessions, clock: Callable[[], float]) -> None:
        self._sessions, self._clock = sessions, clock

    def ready(self, mask: int) -> None:
        self._sessions.tick(self._clock())
