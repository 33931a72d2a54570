"""Whether a description that was measured still is of this machine, and can be relied on."""

from engine.hardware.description import THIS_MACHINE, Hardware
from engine.host import processor

BUSY_SHARE = 0.05  # of the cores, used by others, above which a profile is doubtful


def profile_warnings(name: str, hardware: Hardware) -> list[str]:
    """What the user should know of a description that was measured."""
    profiled = hardware.profiled
    if profiled is None:
        return []
    found = []
    if name == THIS_MACHINE and profiled.processor != processor():
        found.append(
            f"sim:{name} was measured on {profiled.date} on another processor ({profiled.processor}): run `redline "
            "profile` again"
        )
    if profiled.busy > BUSY_SHARE:
        found.append(
            f"sim:{name}: others used {profiled.busy:.0%} of the cores when it was measured: times may be too long"
        )
    return found
