"""What can go wrong in `ft`.

FtError
├── CodecError           buffers or losses that the code cannot work with
│   └── KernelUnavailable    the compiled kernel was asked for by name and cannot be used
├── PlacementError       the code does not fit the nodes (bad input)
├── MemoryTooSmall       host memory cannot hold the buffers (bad input)
├── ForeignSnapshot      a snapshot of another job, model or layout
├── ChunkCorrupt         a chunk's bytes do not match its checksum
├── TransportError       a link to an agent
│   ├── AuthenticationFailed  the other side does not know the job's secret
│   ├── FrameError            a frame is oversized, truncated or malformed
│   └── PeerLost              the other side closed, or was silent past a deadline
├── AgentError           the agent of this node cannot be started or reached, or refused a request
│   └── BufferBusy           no buffer is free: the previous snapshot is not committed yet
├── IncompleteError      the pieces at hand do not cover a tensor
└── DurableError         a durable checkpoint cannot be written or read
"""


class FtError(Exception):
    """Base of every error raised by this package; the message says what to do next."""


class CodecError(FtError):
    """The number, size or kind of the buffers, or the number of losses, does not fit the code."""


class KernelUnavailable(CodecError):
    """The kernel asked for by name cannot be used on this machine."""


class PlacementError(FtError):
    """The code does not fit the number of nodes; shows the arithmetic."""


class MemoryTooSmall(FtError):
    """Host memory cannot hold the buffers; shows the arithmetic."""


class ForeignSnapshot(FtError):
    """The snapshot belongs to another job, model or layout; nothing was overwritten."""


class ChunkCorrupt(FtError):
    """A chunk does not match its checksum; names the node, the stripe and the chunk."""


class TransportError(FtError):
    """A link to an agent failed; names the peer."""


class AuthenticationFailed(TransportError):
    """The other side did not prove that it knows the job's secret."""


class FrameError(TransportError):
    """A frame was longer than allowed, ended early or could not be decoded."""


class PeerLost(TransportError):
    """The other side closed the connection or was silent past a deadline; says who waited for whom."""


class AgentError(FtError):
    """The snapshot agent of this node cannot be started or reached, or it refused a request."""


class BufferBusy(AgentError):
    """No buffer is free, because the previous snapshot is not committed yet."""


class IncompleteError(FtError):
    """The pieces at hand do not cover a tensor; names the tensor and the first hole."""


class DurableError(FtError):
    """A durable checkpoint cannot be written or read; names the file."""
