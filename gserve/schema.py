"""The bodies of requests and replies, from `gserve_core.messages`."""

from gserve_core.messages import ChatRequest, GenerateRequest, Message, ResponseOutput

__all__ = ["ChatRequest", "GenerateRequest", "Message", "ResponseOutput"]
