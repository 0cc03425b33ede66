"""Logging: loggers below "gserve", the level by `GSERVE_LOG_LEVEL`, which servers inherit."""

import logging
import os
import sys

from .errors import ConfigError

LEVEL_VARIABLE = "GSERVE_LOG_LEVEL"
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def setup_logging(level: str | int | None = None) -> logging.Logger:
    """Write gserve's log to stderr, from `level` on (default: `GSERVE_LOG_LEVEL`, else INFO); return its logger.

    The level reaches the servers that are started afterwards. Raises ConfigError: no such level.
    """
    name = logging.getLevelName(level) if isinstance(level, int) else (level or log_level())
    if name.upper() not in _LEVELS:
        raise ConfigError(f"unknown log level '{name}'; expected one of {', '.join(_LEVELS)}")
    logger = logging.getLogger("gserve")
    logger.setLevel(name.upper())
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    return logger


def log_level() -> str:
    """Return the level by name: that of the logger "gserve" where it is set, else the environment's, else INFO."""
    own = logging.getLogger("gserve").level
    return logging.getLevelName(own) if own else os.environ.get(LEVEL_VARIABLE, "INFO")
