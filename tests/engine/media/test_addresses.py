"""Addresses that media may be fetched from."""

import pytest

from engine.errors import ConfigError
from engine.media.addresses import is_allowed, parse_networks


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses_are_allowed(address: str) -> None:
    assert is_allowed(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "192.0.0.1", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.1.1.1", "240.0.0.1",
        "255.255.255.255", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1", "fec0::1", "ff02::1",
        "2001:db8::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:a9fe:a9fe", "::127.0.0.1", "64:ff9b::7f00:1",
        "64:ff9b::8.8.8.8", "64:ff9b:1::1", "2002:7f00:1::", "2001:0:1::1", "::ffff:0:127.0.0.1", "100::1",
    ],
)  # fmt: skip
def test_other_addresses_are_not(address: str) -> None:
    assert not is_allowed(address)


def test_networks_of_the_owner_are_allowed() -> None:
    networks = parse_networks(["10.1.0.0/16", "fd00:1::/32", " 127.0.0.1 "])
    assert is_allowed("10.1.2.3", networks)
    assert is_allowed("::ffff:10.1.2.3", networks)
    assert is_allowed("fd00:1::5", networks)
    assert is_allowed("127.0.0.1", networks)
    assert not is_allowed("10.2.0.1", networks)
    assert not is_allowed("127.0.0.2", networks)
    with pytest.raises(ConfigError, match="--allowed-media-networks"):
        parse_networks(["10.1.0.1/16"])
