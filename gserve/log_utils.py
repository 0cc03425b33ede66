"""Logging, from `gserve_core.host.logs`."""

from gserve_core.host.logs import setup_logging

__all__ = ["setup_logging"]
