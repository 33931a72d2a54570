"""Which addresses media may be fetched from: public ones, and those of networks that the server's owner allows."""

import ipaddress
from collections.abc import Iterable
from typing import TypeAlias

from engine.errors import ConfigError

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

# Ranges of IPv6 that carry an IPv4 address, or that gateways translate: what they reach is another address.
TRANSLATED = tuple(
    ipaddress.IPv6Network(network)
    for network in (
        "::/96",  # IPv4-compatible
        "::ffff:0:0:0/96",  # IPv4-translated (SIIT)
        "64:ff9b::/96",  # NAT64
        "64:ff9b:1::/48",  # NAT64, local
        "2001::/32",  # Teredo
        "2002::/16",  # 6to4
        "fec0::/10",  # site-local, deprecated
    )
)


def parse_networks(given: Iterable[str]) -> tuple[Network, ...]:
    """Networks such as 10.0.0.0/8. Raises ConfigError for one that is not valid."""
    found = []
    for text in given:
        try:
            found.append(ipaddress.ip_network(text.strip()))
        except ValueError as error:
            raise ConfigError(f"--allowed-media-networks: {error}; write a network as 10.1.0.0/16") from error
    return tuple(found)


def is_allowed(text: str, allowed: Iterable[Network] = ()) -> bool:
    """Whether an address may be connected to.

    Public addresses may. Private, loopback, link-local, multicast, shared, documentation and reserved ones may not, nor
    addresses of IPv6 that stand for others, unless a network in `allowed` contains them.
    """
    address: Address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if any(address in network for network in allowed if network.version == address.version):
        return True
    if isinstance(address, ipaddress.IPv6Address) and any(address in network for network in TRANSLATED):
        return False
    return address.is_global and not (
        address.is_multicast or address.is_reserved or address.is_loopback or address.is_link_local
        or address.is_private or address.is_unspecified
    )  # fmt: skip
