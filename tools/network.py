"""The network interface that leads to the main machine, for gloo, which carries sums and messages between CPUs."""
import os  # the environment
import socket  # routes and addresses
from contextlib import suppress  # without an answer gloo chooses

import psutil  # accelerate needs it, too


def choose_interface(address):  # address (str): of the main machine, a name or a number of IPv4 or IPv6
    """Set GLOO_SOCKET_IFNAME, unless the user has: gloo itself trusts the host name. Raises: OSError (unknown name)."""
    kind, *_, place = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]  # port 9: nothing is sent there
    with suppress(OSError, KeyError), socket.socket(kind, socket.SOCK_DGRAM) as query:  # no route, or an alias
        query.connect(place)  # UDP sends nothing: Linux looks up the route, for IPv4 or IPv6
        names = {part.address: name for name, parts in psutil.net_if_addrs().items() for part in parts}  # eth0
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names[query.getsockname()[0]])  # the user's own stays
