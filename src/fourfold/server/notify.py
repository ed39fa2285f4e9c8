"""Tells systemd how far the server is (sd_notify(3)), where systemd asked to be told: `Type=notify`."""

from __future__ import annotations

import logging
import os
import socket

VARIABLE = "NOTIFY_SOCKET"
READY, STOPPING = "READY=1", "STOPPING=1"

_log = logging.getLogger(__name__)


def notify(state: str) -> None:
    """One datagram; nothing where nobody asked. That nobody listens is no reason to end."""
    address = os.environ.get(VARIABLE, "")
    if not address:
        return
    if address.startswith("@"):  # a name without a file
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as end:
            end.sendto(state.encode(), address)
    except OSError as error:
        _log.warning("systemd could not be told %s: %s", state, error.strerror or error)
