"""The bodies of requests and replies, from `gserve_core.schema`."""

from gserve_core.schema import ChatRequest, GenerateRequest, Message, ResponseOutput

__all__ = ["ChatRequest", "GenerateRequest", "Message", "ResponseOutput"]
