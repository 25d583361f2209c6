"""What can go wrong in `ft`.

FtError
├── CodeError            a code that cannot be built, or more chunks lost than it has parity
├── PlacementError       the nodes cannot be grouped as the spec asks (bad input)
├── MemoryRefused        the host has too little memory for the slots (bad input)
├── ChecksumError        bytes do not match the checksum that was recorded for them
├── IncompleteError      a tensor is not covered by the pieces at hand
├── DurableError         a checkpoint on disk is missing, damaged or does not fit
├── AgentError           the snapshot agent cannot be reached or refused
│   ├── AgentLost        its socket closed or a deadline passed
│   └── SlotBusy         no slot is free: the previous snapshot is not committed yet
└── TransportError       a frame or a handshake that is not what it must be
    └── Refused          the other side is not who it must be
"""


class FtError(Exception):
    """Base of every error raised by this package; the message says what to do next."""


class CodeError(FtError):
    """A code that cannot be built, or more chunks lost than it has parity."""


class PlacementError(FtError):
    """The nodes cannot be grouped as the spec asks."""


class MemoryRefused(FtError):
    """The host has too little memory for the slots; the message has the arithmetic."""


class ChecksumError(FtError):
    """Bytes do not match the checksum recorded for them; names whose bytes."""


class IncompleteError(FtError):
    """A tensor is not covered by the pieces at hand; names the tensor and the first hole."""


class DurableError(FtError):
    """A checkpoint on disk is missing, damaged or does not fit; names the file."""


class AgentError(FtError):
    """The snapshot agent refused a request; names the request."""


class AgentLost(AgentError):
    """The agent's socket closed, or it did not answer before the deadline."""


class SlotBusy(AgentError):
    """No slot is free, because the previous snapshot is not committed yet."""


class TransportError(FtError):
    """A frame or a handshake that is not what it must be."""


class Refused(TransportError):
    """The other side did not show that it knows the secret, or is not who it must be."""
