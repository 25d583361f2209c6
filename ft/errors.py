"""Exceptions of `ft`.

FtError
├── CodecError           buffers or losses that the code cannot handle
│   └── KernelUnavailable    the kernel requested by name cannot be used
├── PlacementError       the code does not fit the nodes (bad input)
├── MemoryTooSmall       host memory cannot hold the buffers (bad input)
├── TooFewDescriptors    a process may not open as many files as an agent needs (bad input)
├── ForeignSnapshot      a snapshot of another job, model or layout
├── ChunkCorrupt         a chunk's bytes do not match its checksum
├── PageLockFailed       snapshot memory cannot be page-locked for a GPU
├── DeviceMissedMemory   a copy from a GPU did not arrive in the memory of a snapshot
├── TransportError       a link to an agent
│   ├── AuthenticationFailed  the other side does not know the job's secret
│   ├── FrameError            a frame is oversized, truncated or malformed
│   └── PeerLost              the other side closed, or was silent past a deadline
├── AgentError           the agent of this node cannot be started or reached, or refused a request
│   └── BufferBusy           no buffer is free: the previous snapshot is not committed yet
├── IncompleteError      the available pieces do not cover a tensor
└── DurableError         a durable checkpoint cannot be written or read
"""


class FtError(Exception):
    """Base of all errors raised by this package. The message says what to do next."""


class CodecError(FtError):
    """The number, size or kind of the buffers, or the number of losses, does not fit the code."""


class KernelUnavailable(CodecError):
    """The kernel requested by name cannot be used on this machine."""


class PlacementError(FtError):
    """The code does not fit the number of nodes. The message shows the arithmetic."""


class MemoryTooSmall(FtError):
    """Host memory cannot hold the buffers. The message shows the arithmetic."""


class TooFewDescriptors(FtError):
    """This process may not open as many files as an agent of the job needs. The message shows the arithmetic."""


class ForeignSnapshot(FtError):
    """The snapshot belongs to another job, model or layout. Nothing was overwritten."""


class ChunkCorrupt(FtError):
    """A chunk does not match its checksum. The message names the node, the stripe and the chunk."""


class PageLockFailed(FtError):
    """The CUDA runtime does not page-lock snapshot memory. Copies from the GPU then take another way."""


class DeviceMissedMemory(FtError):
    """A copy from a GPU ended, but the memory of the snapshot does not hold what it wrote. Nothing was sealed."""


class TransportError(FtError):
    """A link to an agent failed. The message names the peer."""


class AuthenticationFailed(TransportError):
    """The other side did not prove that it knows the job's secret."""


class FrameError(TransportError):
    """A frame was longer than allowed, ended early or could not be decoded."""


class PeerLost(TransportError):
    """The other side closed the connection or was silent past a deadline. The message names both sides."""


class AgentError(FtError):
    """The snapshot agent of this node cannot be started or reached, or it refused a request."""


class BufferBusy(AgentError):
    """No buffer is free, because the previous snapshot is not committed yet."""


class IncompleteError(FtError):
    """The available pieces do not cover a tensor. The message names the tensor and the first gap."""


class DurableError(FtError):
    """A durable checkpoint cannot be written or read. The message names the file."""
