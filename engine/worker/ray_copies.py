"""Sends the files of a model or an adapter to the Ray nodes that lack them, through Ray's object store."""

import hashlib
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import ModelError
from engine.text import first_line
from engine.worker.model_copy import ModelFile, copy_key, read_pieces

IN_FLIGHT = 4  # pieces that are read but not yet written on all nodes
ANSWER_S = 300.0  # for a node to write a piece, or to check a copy


def send_copies(ray: Any, actors: list[Any], folder: Path, files: Sequence[ModelFile]) -> list[Path]:
    """Copy files below a folder to the machines of actors (see `engine.worker.rank_host.RankHost`); where they lie.

    A machine that has the copy of an earlier start gets nothing.

    Raises ModelError if a disk is too small, or if bytes changed on their way.
    """
    key = copy_key(folder, files)
    found: list[str | None] = ray.get([actor.find_copy.remote(key) for actor in actors], timeout=ANSWER_S)
    missing = [actor for actor, copy in zip(actors, found, strict=True) if copy is None]
    if missing:
        try:
            ray.get([actor.begin_copy.remote(files) for actor in missing], timeout=ANSWER_S)
            sums = {file.name: _send(ray, missing, folder / file.name, file.name) for file in files}
            made = ray.get([actor.finish_copy.remote(sums) for actor in missing], timeout=ANSWER_S)
        except ray.exceptions.RayTaskError as error:
            for actor in missing:
                actor.drop_copy.remote()
            raise ModelError(str(error.cause)) from error
        except ray.exceptions.RayError as error:
            raise ModelError(f"--distribute-weights: a node can't be reached any more: {first_line(error)}") from error
        copies = iter(made)
        found = [copy or next(copies) for copy in found]
    return [Path(copy) for copy in found if copy is not None]


def _send(ray: Any, actors: list[Any], path: Path, name: str) -> str:
    """Send a file to all actors; its SHA-256."""
    digest = hashlib.sha256()
    under_way: deque[list[Any]] = deque()
    for at, piece in read_pieces(path):
        digest.update(piece)
        stored = ray.put(piece)
        under_way.append([actor.write_copy.remote(name, at, stored) for actor in actors])
        if len(under_way) > IN_FLIGHT:
            ray.get(under_way.popleft(), timeout=ANSWER_S)
    for writes in under_way:
        ray.get(writes, timeout=ANSWER_S)
    return digest.hexdigest()
