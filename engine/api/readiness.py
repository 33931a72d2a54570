"""Whether the server can answer: an engine has produced a token, or a vector if its model pools, since its start."""

import asyncio

from engine.api.error_responses import ApiError
from engine.errors import RedlineError
from engine.frontend.connect import EngineClient
from engine.frontend.core_client import CoreClient
from engine.frontend.sampling_params import SamplingParams
from engine.frontend.streams import Origin, collect_outputs
from engine.frontend.vectors import POOLING, collect_vectors

PATIENCE_S = 0.5  # for the probe, before the answer is "not ready": orchestrators wait a second by default
PROBE = Origin("readiness-probe")


class Readiness:
    """Probes the engines of one API process."""

    def __init__(self, client: EngineClient):
        self._client = client
        self._probes: dict[int, asyncio.Task[None]] = {}  # by replica
        self._answered: dict[int, int] = {}  # by replica, the process that has answered a probe

    async def check(self) -> None:
        """Raise ApiError 503, with the cause, unless at least one engine has produced a token and does not hang."""
        client = self._client
        if cause := client.dead or client.unavailable or client.hung:
            raise _not_ready(cause)
        waiting = []
        for replica in client.serving:
            if replica.hung:
                continue
            if (
                replica.total_stats.core.generation_tokens
                or self._answered.get(replica.replica) == replica.ready.process_id
            ):
                return
            waiting.append(self._probe(replica))
        await asyncio.wait(waiting, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
        ended = [probe for probe in waiting if probe.done()]
        if not ended:
            raise _not_ready(f"no {_product(client)} has been produced yet")
        for probe in ended:
            if (error := probe.exception()) is not None:
                raise _not_ready(f"a probe failed: {error}")

    def _probe(self, replica: CoreClient) -> "asyncio.Task[None]":
        """The request for one token that runs on a replica; begun if there is none."""
        probe = self._probes.get(replica.replica)
        if probe is None or probe.done():
            probe = self._probes[replica.replica] = asyncio.ensure_future(self._ask(replica))
        return probe

    async def _ask(self, replica: CoreClient) -> None:
        process = replica.ready.process_id
        try:
            prompt = replica.tokenizer.encode("a", add_special_tokens=False)[:1] or [0]
            if replica.ready.pooling is None:
                params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
                async with replica.add_request([prompt], params, origin=PROBE) as stream:
                    await collect_outputs(stream)
            else:
                async with replica.add_request([prompt], POOLING, origin=PROBE) as stream:
                    await collect_vectors(stream)
        except RedlineError:
            raise
        except Exception as error:
            raise RedlineError(str(error)) from error
        self._answered[replica.replica] = process


def _product(client: EngineClient) -> str:
    return "token" if client.ready.pooling is None else "vector"


def _not_ready(cause: str) -> ApiError:
    return ApiError(503, f"not ready: {cause}", code="not_ready", headers={"Retry-After": "1"})
