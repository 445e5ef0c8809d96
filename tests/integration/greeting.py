"""A server that only greets, as a MongoDB of any version and state does: old ones are on no package index."""

import socketserver
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bson

_OP_QUERY, _OP_MSG, _OP_REPLY = 2004, 2013, 1


@contextmanager
def greeting_server(release: str, wire_version: int, **differently: Any) -> Iterator[str]:
    """Run it while the context lasts; yields its URI. It is its own primary, unless it greets `differently`."""
    hello = {
        **{"ok": 1.0, "isWritablePrimary": True, "ismaster": True, "setName": "rs0", "setVersion": 1, "me": "x:1"},
        **{"minWireVersion": 0, "maxWireVersion": wire_version, "maxBsonObjectSize": 16 << 20, "readOnly": False},
        **{"maxMessageSizeBytes": 48_000_000, "maxWriteBatchSize": 100_000},
    }

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            address = "{}:{}".format(*self.server.server_address[:2])
            while head := self.rfile.read(16):
                length, number, _, code = struct.unpack("<iiii", head)
                body = self.rfile.read(length - 16)
                answer: dict[str, Any] = {**hello, "hosts": [address], "me": address, "primary": address, **differently}
                if code == _OP_MSG and "buildInfo" in bson.decode(body[5:]):
                    answer = {"ok": 1.0, "version": release}
                document = bson.encode(answer)
                if code == _OP_MSG:
                    out = struct.pack("<iB", 0, 0) + document
                    self.wfile.write(struct.pack("<iiii", 16 + len(out), 1, number, _OP_MSG) + out)
                elif code == _OP_QUERY:
                    out = struct.pack("<iqii", 8, 0, 0, 1) + document
                    self.wfile.write(struct.pack("<iiii", 16 + len(out), 1, number, _OP_REPLY) + out)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        allow_reuse_address = True

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"mongodb://127.0.0.1:{server.server_address[1]}/?replicaSet=rs0"
        finally:
            server.shutdown()
            thread.join()
