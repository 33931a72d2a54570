"""TCP links that carry the features of multimodal inputs, for ranks that have no memory in common with the core.

Ranks of one machine read features from files in shared memory (see `engine.multimodal.feature_files`). Other machines
get them in a command of their own before the step that encodes the input, so step messages stay small. They are sent
again only if the input is encoded again.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from engine.messages import decode_copying_step
from engine.worker.rank_protocol import Features, FrameKind
from engine.worker.tcp_links import RankHosts, TcpLinks


class MediaLinks(TcpLinks):
    """As the base class, for a model that takes images, audio or video."""

    def __init__(self, hosts: RankHosts):
        super().__init__(hosts)
        self._files: dict[int, list[str]] = {}  # of the inputs of each slot

    def send(self, kind: FrameKind, body: bytes) -> bool:
        if kind is FrameKind.FORWARD:
            for features in self._features(body):
                if not super().send(FrameKind.FEATURES, msgspec.msgpack.encode(features)):
                    return False
        return super().send(kind, body)

    def _features(self, message: bytes) -> Iterator[Features]:
        """What an encoded StepMessage encodes. A file that can't be read is missed by the ranks, which report it."""
        step = decode_copying_step(message)
        for assigned in step.assigned_slots:
            self._files[assigned.slot] = [one.features for one in assigned.mm_inputs]
        for slot, index in step.encoder_inputs:
            path = self._files[slot][index]
            with suppress(OSError):
                yield Features(path, Path(path).read_bytes())
