"""A TCP proxy in front of the members of a replica set, which cuts the workers' connections when it is told to.

`python proxy.py LISTEN:TARGET …` (ports on 127.0.0.1), in a process of its own, so that what it carries does not wait
for whoever drives it. Each line on stdin, `cut`, cuts every connection of a worker in the middle of its next answer:
the request has reached the server and may have taken effect, and its sender never learns.
"""

import asyncio
import sys

#: What PyMongo says first names the application: only connections of workers are cut, not those between members.
_WORKER = b"dltask"
_BLOCK = 1 << 16


class Connection:
    """One connection, both ways."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self._writers = (client, server)
        self.of_worker = False
        #: Set: the next answer is not passed on, and the connection ends there.
        self.cut = False

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


connections: set[Connection] = set()


async def serve(target: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Carry one connection until either end closes it."""
    try:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", target)
    except OSError:
        writer.close()
        return
    connection = Connection(writer, server_writer)
    connections.add(connection)

    async def carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, answers: bool) -> None:
        try:
            while block := await source.read(_BLOCK):
                if answers and connection.cut:
                    break
                if not answers and not connection.of_worker:
                    connection.of_worker = _WORKER in block
                sink.write(block)
                await sink.drain()
        except OSError:
            pass
        finally:
            connection.close()

    try:
        await asyncio.gather(carry(reader, server_writer, answers=False), carry(server_reader, writer, answers=True))
    finally:
        connections.discard(connection)


async def main(pairs: list[str]) -> None:
    """Serve until stdin ends."""
    for pair in pairs:
        listen, target = map(int, pair.split(":"))
        await asyncio.start_server(lambda r, w, t=target: serve(t, r, w), "127.0.0.1", listen)
    commands = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    print("ready", flush=True)
    while await commands.readline():
        for connection in connections:
            connection.cut = connection.of_worker


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
