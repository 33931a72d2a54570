"""The executor of ranks on several machines."""

import logging
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

from engine.errors import RedlineError, cause_of
from engine.worker.adapter_manager import LOAD_ADAPTER
from engine.worker.multiprocess import MultiprocessExecutor

log = logging.getLogger("redline.core")


class AdapterHosts(Protocol):
    """Provides the machines of the ranks with adapters; see `engine.worker.ray_hosts.RayHosts`."""

    def provide_adapter(self, path: Path, *, distribute: bool) -> str: ...


class HostedExecutor(MultiprocessExecutor):
    """Makes sure that all machines have the files of an adapter before ranks load it.

    Args:
        arguments, more: of the base class.
        hosts: the machines.
        distribute: whether they get copies of the files, or must have them.
    """

    def __init__(self, *arguments: Any, hosts: AdapterHosts, distribute: bool, **more: Any):
        self._hosts = hosts
        self._distribute = distribute
        self._providing = threading.Lock()  # a machine receives one copy at a time
        super().__init__(*arguments, **more)

    def call(self, method: str, arguments: dict[str, Any]) -> "Future[Any]":
        """As in the base class. Files are sent by a thread; calls that follow may be executed before this one."""
        if method != LOAD_ADAPTER:
            return super().call(method, arguments)
        loaded: Future[Any] = Future()
        threading.Thread(target=self._load, args=(arguments, loaded), name="adapter-files", daemon=True).start()
        return loaded

    def _load(self, arguments: dict[str, Any], loaded: "Future[Any]") -> None:
        try:
            with self._providing:
                copy = self._hosts.provide_adapter(Path(arguments["path"]), distribute=self._distribute)
            done = super().call(LOAD_ADAPTER, {**arguments, "copy": copy})
        except RedlineError as error:
            loaded.set_exception(error)
        except Exception as error:  # of a file, or of Ray: somebody waits for it
            log.exception("the files of an adapter could not be provided")
            loaded.set_exception(RedlineError(f"{arguments['path']} could not be sent: {cause_of(error)}"))
        else:
            done.add_done_callback(lambda ended: _pass_on(ended, loaded))


def _pass_on(ended: "Future[Any]", to: "Future[Any]") -> None:
    if ended.cancelled():
        to.cancel()
    elif (error := ended.exception()) is not None:
        to.set_exception(error)
    else:
        to.set_result(ended.result())
