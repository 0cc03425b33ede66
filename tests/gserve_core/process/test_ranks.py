"""The connections of a server's ranks."""

import asyncio
import contextlib
import json
import socket

import pytest

from gserve_core.interfaces import Rank
from gserve_core.process.ranks import Others, RankLost

RANK = Rank(0, 2, "127.0.0.1", 1, "127.0.0.1", "lo")


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\xff\n",
        b'{"number":1,"node":"\xff","token":"x"}\n',
        b'{"number":1,"node":"n","token":"wrong"}\n',
        b"1" * 5000,
    ],
)
def test_a_stranger_at_the_port_of_the_ranks_ends_no_server(line: bytes) -> None:
    async def check() -> None:
        loop = asyncio.get_running_loop()
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setblocking(False)
        others = Others(RANK)
        accepting = asyncio.create_task(others.accept(listening, "token"))
        with socket.create_connection(listening.getsockname()) as rank:
            rank.sendall(json.dumps({"number": 1, "node": "n2", "token": "token"}).encode() + b"\n")
            working = asyncio.create_task(others.watch(asyncio.Event().wait()))
            with socket.create_connection(listening.getsockname()) as stranger:
                stranger.sendall(line)
                stranger.shutdown(socket.SHUT_WR)
                stranger.setblocking(False)
                async with asyncio.timeout(10):
                    with contextlib.suppress(ConnectionResetError):
                        assert await loop.sock_recv(stranger, 1) == b""
            assert not working.done()
            assert not accepting.done()
        with pytest.raises(RankLost, match="rank 1 on n2: its process ended"):
            async with asyncio.timeout(10):
                await working
        accepting.cancel()
        await asyncio.gather(accepting, return_exceptions=True)
        others.close()

    asyncio.run(check())
