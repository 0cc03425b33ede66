"""The built-in transport: HTTP.

People and other languages use JSON (`/health`, `/chat`, `/generate`, `/shutdown`). gserve's own client and server use
streamed msgpack (`/run`).
"""

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Annotated, ClassVar

from msgspec import Meta

from gserve_core.config import GatewayConfig
from gserve_core.hookspecs import hookimpl
from gserve_core.interfaces import Access, Address, Connection, GatewayApi, ServerApi, Transport


@dataclass(frozen=True, kw_only=True)
class HttpTransport(Transport):
    """HTTP/1.1. `max_body_mib`: maximum size of a request body, in MiB."""

    name: ClassVar[str] = "http"
    max_body_mib: Annotated[int, Meta(ge=1, le=65536, description="1 to 65536 MiB")] = 64

    def preload(self) -> None:
        """Import the server's half."""
        from . import http_server  # noqa: F401

    def serve(self, api: ServerApi, host: str, port: int) -> AbstractAsyncContextManager[Address]:
        """Listen and answer until the context ends."""
        from .http_server import serve  # imports fastapi and uvicorn, which a client does not need

        return serve(api, host, port, max_body=self.max_body_mib << 20)

    def serve_gateway(self, api: GatewayApi, at: GatewayConfig) -> AbstractAsyncContextManager[Address]:
        """Listen for a service, and pass requests on to its servers, until the context ends."""
        from .http_gateway import serve_gateway

        return serve_gateway(api, at, max_body=self.max_body_mib << 20)

    def connect(self, address: Address, access: Access) -> Connection:
        """Return a connection to a server."""
        from .http_client import HttpConnection  # imports httpx, which a server does not need

        return HttpConnection(address, access)


@hookimpl
def gserve_register_transports() -> list[type[Transport]]:
    """Return the HTTP transport."""
    return [HttpTransport]
