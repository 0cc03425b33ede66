"""Certificates for HTTPS, in files in PEM format."""

import re
import secrets
from pathlib import Path

from ..errors import ConfigError

CERTIFICATE = re.compile("-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)
"""Pattern of a certificate in PEM format."""
ENCRYPTED = re.compile("-----BEGIN ENCRYPTED |^Proc-Type: .*ENCRYPTED", re.MULTILINE)
"""Pattern of a private key that needs a password."""
NO_PASSWORD = secrets.token_hex(8)
"""Given as the password of a key. Without one, OpenSSL would ask the terminal for it."""


def check_certificate(certfile: str, keyfile: str) -> None:
    """Check that HTTPS can be spoken with a certificate and its private key. Paths of files.

    Raises ConfigError: it cannot. The error has the place of the field of `GatewayConfig`.
    """
    import ssl

    _read(certfile, "certfile")
    key = _read(keyfile, "keyfile")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_verify_locations(certfile)
    except ssl.SSLError as error:
        raise ConfigError(
            f"'{certfile}' has no certificate in PEM format: expected a file with '-----BEGIN CERTIFICATE-----'",
            at="$.gateway.certfile",
        ) from error
    try:
        context.load_cert_chain(certfile, keyfile, NO_PASSWORD)
    except ssl.SSLError as error:
        if ENCRYPTED.search(key):
            wrong = f"needs a password, which gserve cannot give: write it without one, by openssl pkey -in '{keyfile}'"
        elif error.reason == "KEY_VALUES_MISMATCH":
            wrong = f"is not the key of the certificate in '{certfile}': name the key with which that was made"
        elif "PRIVATE KEY-----" not in key:
            wrong = "has no private key in PEM format: expected a file with '-----BEGIN PRIVATE KEY-----'"
        else:
            wrong = f"cannot be used with the certificate in '{certfile}': {error.reason or error}"
        raise ConfigError(f"'{keyfile}' {wrong}", at="$.gateway.keyfile") from error


def first_certificate(file: str | None) -> str:
    """Return the first certificate in a file, and nothing else of the file, such as a private key; "": none."""
    found = None if file is None else CERTIFICATE.search(Path(file).read_text(errors="replace"))
    return "" if found is None else found[0]


def _read(file: str, name: str) -> str:
    """Return the text of a file. `name`: the field that names it. Raises ConfigError: it cannot be read."""
    try:
        return Path(file).read_text(errors="replace")
    except OSError as error:
        what = {"certfile": "the certificate", "keyfile": "the private key"}[name]
        raise ConfigError(
            f"cannot read {what} '{file}': {error.strerror or error}; name a file in PEM format that you may read",
            at=f"$.gateway.{name}",
        ) from error
