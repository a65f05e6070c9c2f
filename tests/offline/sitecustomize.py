"""Imported by every Python that the tests start: a connection to anything but this machine fails, so no lab can use the network unseen."""

import ipaddress
import socket


def _check(address):
    host = address[0] if isinstance(address, tuple) else None
    if host is None or host in ("localhost", ""):
        return  # a Unix socket, or this machine
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local:
        raise OSError(f"the tests block the network, and something asked for {host}")


class LoopbackSocket(socket.socket):
    def connect(self, address):
        _check(address)
        return super().connect(address)

    def connect_ex(self, address):
        _check(address)
        return super().connect_ex(address)

    def sendto(self, data, *arguments):
        _check(arguments[-1])
        return super().sendto(data, *arguments)


_getaddrinfo = socket.getaddrinfo


def _loopback_getaddrinfo(host, *arguments, **options):
    if host is not None:
        _check((host.decode() if isinstance(host, bytes) else host,))
    return _getaddrinfo(host, *arguments, **options)


socket.socket = LoopbackSocket
socket.getaddrinfo = _loopback_getaddrinfo
