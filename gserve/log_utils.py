"""Logging. It lives in `gserve_core.log_utils`."""

from gserve_core.log_utils import setup_logging

__all__ = ["setup_logging"]
