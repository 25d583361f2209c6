"""Coverage-guided fuzzing of what reads frames: nothing but a message, a refusal or the end of the stream comes out."""

import subprocess
import sys
from pathlib import Path

import pytest

from keepwarm.ft.protocol.messages import Bucket, Committed, Decision, Hello, Known, Part, Seal, SnapshotId, encode

RUNS = 100_000
TARGET = """
import socket, sys
import atheris
with atheris.instrument_imports(include=["keepwarm.ft"]):
    from keepwarm.ft.errors import FrameError, PeerLost
    from keepwarm.ft.protocol.messages import MESSAGE_LIMIT, AgentMessage, WorkerMessage, encode
    from keepwarm.ft.transport.channel import Channel, decoder_of

PAYLOAD = 4096
DECODERS = [decoder_of(AgentMessage), decoder_of(WorkerMessage)]

def read(data):
    given = atheris.FuzzedDataProvider(data)
    decode, cut = DECODERS[given.ConsumeBool()], given.ConsumeIntInRange(0, 64)
    stream = given.ConsumeBytes(60_000)
    ours, theirs = socket.socketpair(type=socket.SOCK_STREAM)
    channel = Channel(ours, decode, PAYLOAD)
    try:
        # In two pieces, so that a frame is cut anywhere.
        for piece in (stream[:cut], stream[cut:]):
            theirs.sendall(piece)
            for message, payload in channel.read(lambda message, size: memoryview(bytearray(size))):
                assert payload is None or payload.nbytes <= PAYLOAD
                if message is not None:
                    assert decode(memoryview(encode(message))) == message
        theirs.shutdown(socket.SHUT_WR)
        list(channel.read(lambda message, size: None))
    except (FrameError, PeerLost):
        pass
    finally:
        assert len(channel._in) <= MESSAGE_LIMIT + (128 << 10)
        channel.close()
        theirs.close()

atheris.Setup(sys.argv, read)
atheris.Fuzz()
"""


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_frame_reader_fuzzed_streams_never_crash(tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="pip install 'keepwarm[fuzz]'")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds()):
        (corpus / str(number)).write_bytes(seed)
    command = [sys.executable, "-c", TARGET, str(corpus), f"-runs={RUNS}", "-max_len=8192", "-seed=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3], timeout=3000)
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stderr.strip().splitlines()[-1])


def seeds() -> list[bytes]:
    """One frame of each kind to begin from, as the target reads its input from both ends."""
    snapshot = SnapshotId("run", 1, 2, "layout")
    messages = [
        Hello(role="agent", run="run", slot=1, epoch=0, incarnation=2, nonce=b"n" * 32),
        Known(snapshot=snapshot, prepared=(0, 1)),
        Decision(epoch=3, snapshot=snapshot, incarnations=(1, 2)),
        Bucket(snapshot=snapshot, stripe=0, index=0, sum=1, size=5),
        Part(epoch=1, snapshot=snapshot, stripe=0, owner=1, index=0, count=1, sum=1, size=5),
        Seal(snapshot=snapshot, sums=(1, 2, 3)),
        Committed(snapshot=snapshot, seconds=0.5),
    ]
    frames = [(body := encode(message)) and len(body).to_bytes(4, "big") + body + b"12345" for message in messages]
    return [frame + bytes([16, kind]) for frame in frames for kind in (0, 1)]
