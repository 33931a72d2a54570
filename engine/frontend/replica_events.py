"""What the first API process of a server reports to all front ends about its replicas."""

from typing import TypeAlias

import msgspec

from engine.frontend.transport import CoreAddress


class ReplicaStarting(msgspec.Struct, tag="starting"):
    """A replica is added: its core is being started."""

    replica: int


class ReplicaUp(msgspec.Struct, tag="up"):
    """A core serves: the first of a new replica, or one that replaces another."""

    replica: int
    core: CoreAddress


class ReplicaLost(msgspec.Struct, tag="lost"):
    """A core ended by itself."""

    replica: int
    cause: str
    restarting: bool  # it is started again


class ReplicaDraining(msgspec.Struct, tag="draining"):
    """A replica gets no more requests."""

    replica: int
    drain: int  # the number of this drain, which front ends report when they have no requests there


class DrainTimeout(msgspec.Struct, tag="drain-timeout"):
    """The time limit of a drain has passed: its requests must end."""

    replica: int
    cause: str


class DrainCanceled(msgspec.Struct, tag="drain-canceled"):
    """A draining replica gets requests again."""

    replica: int


class ReplicaRemoved(msgspec.Struct, tag="removed"):
    """A replica was drained, or could not be started."""

    replica: int


ReplicaEvent: TypeAlias = (
    ReplicaStarting | ReplicaUp | ReplicaLost | ReplicaDraining | DrainTimeout | DrainCanceled | ReplicaRemoved
)
