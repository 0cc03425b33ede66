"""The bodies of requests and replies. They live in `gserve_core.schema`."""

from gserve_core.schema import ChatRequest, GenerateRequest, Message, ResponseOutput

__all__ = ["ChatRequest", "GenerateRequest", "Message", "ResponseOutput"]
