"""`--kv-spill`: where KV blocks stay when the KV cache evicts them."""

import re
from dataclasses import dataclass

from engine.errors import ConfigError
from engine.text import parse_size

FLAG = "--kv-spill"
FORM = "host=4GiB,disk=/path:50GiB (disk= may be left out)"


@dataclass(frozen=True, slots=True)
class KVSpill:
    """Sizes in bytes, of all replicas together. disk_path: empty without files."""

    host_bytes: int
    disk_path: str = ""
    disk_bytes: int = 0


def parse_kv_spill(text: str) -> KVSpill:
    """Read the value of the flag; the path may contain colons and commas. Raises ConfigError."""
    host, comma, disk = text.partition(",")
    tier, _, size = host.partition("=")
    if tier.strip() != "host":
        raise ConfigError(f"{FLAG} must begin with host=SIZE, as in {FORM}, not {text!r}")
    host_bytes = _size(size, "host=")
    if not comma:
        return KVSpill(host_bytes)
    tier, _, place = disk.partition("=")
    path, colon, size = place.rpartition(":")
    if tier.strip() != "disk" or not colon or not path.strip():
        raise ConfigError(f"{FLAG} takes disk=PATH:SIZE after host=, as in {FORM}, not {disk!r}")
    if re.search(r":[^:]*,\s*disk=", path):  # the size of one part and the beginning of the next
        raise ConfigError(f"{FLAG} takes one disk=, as in {FORM}, not {disk!r}")
    return KVSpill(host_bytes, path.strip(), _size(size, "disk="))


def _size(text: str, tier: str) -> int:
    try:
        size = parse_size(text)
    except ValueError as error:
        raise ConfigError(f"{FLAG} {tier}: {error}") from error
    if size < 1:
        raise ConfigError(f"{FLAG} {tier} must be at least 1 byte")
    return size


def check_kv_spill(text: str | None, *, simulated: bool, prefix_caching: bool, driven: bool) -> None:
    """Raise ConfigError if the flag is given and malformed, or does not work with the other options.

    Args:
        simulated: the hardware is.
        prefix_caching: whether blocks are cached at all.
        driven: with `--ablate driver-broadcast`, where only rank 0 receives steps.
    """
    if text is None:
        return
    parse_kv_spill(text)
    if simulated:
        raise ConfigError(f"{FLAG} does not work with --device sim:…, whose KV cache has no content to keep")
    if not prefix_caching:
        raise ConfigError(f"{FLAG} needs prefix caching: leave out --no-enable-prefix-caching and the ablation of it")
    if driven:
        raise ConfigError(f"{FLAG} does not work with --ablate driver-broadcast: only rank 0 receives copies of blocks")


def blocks_per_replica(size: int, replicas: int, block_bytes: int, tier: str) -> int:
    """The blocks of a tier, given the bytes of all replicas and of a block on all ranks. Raises ConfigError if none."""
    count = size // replicas // block_bytes
    if not count:
        each = f" for each of {replicas} replicas" if replicas > 1 else ""
        raise ConfigError(f"{FLAG} {tier} is too small: a KV block has {block_bytes:,} bytes{each}")
    return count
