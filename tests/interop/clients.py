"""The clients that `make interop` runs, and the servers that they need."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Client:
    """A client, with its checks.

    Attributes:
        name: in the table.
        requirements: what its environment has, in exact versions; none for a client that is never installed.
        scripts: in tests/interop/checks.
        servers: keys of SERVERS.
        variable: names an interpreter that has the client; it is used instead of an environment of our own.
    """

    name: str
    requirements: tuple[str, ...]
    scripts: tuple[str, ...]
    servers: tuple[str, ...] = ("chat",)
    variable: str = ""

    @property
    def key(self) -> str:
        """Its name in CLIENTS=… and in the file system."""
        return self.name.lower().replace(" ", "-")


@dataclass(frozen=True, slots=True)
class ServerKind:
    """A model, with the flags of its server. `generates` tells whether it has log-likelihoods."""

    model: str
    flags: tuple[str, ...] = ()
    generates: bool = False


# Greedy outputs of float32 are compared with transformers' log-likelihoods.
SERVERS = {
    "chat": ServerKind("smollm2-135m", ("--dtype", "float32", "--max-model-len", "2048"), generates=True),
    "embedding": ServerKind("minilm-l6"),
    "vision": ServerKind("smollm2-135m-vision", ("--max-model-len", "2048")),
}
ALL = tuple(SERVERS)

CLIENTS = (
    Client("openai", ("openai==3.57.0",), ("check_openai.py", "check_openai_responses.py"), ALL),
    Client("anthropic", ("anthropic==2.14.0",), ("check_anthropic.py",), ("chat", "vision")),
    Client("litellm", ("litellm==1.110.2",), ("check_litellm.py",), ALL),
    Client("langchain-openai", ("langchain-openai==1.7.4",), ("check_langchain.py",), ALL),
    Client(
        "llama-index",
        (
            "llama-index-core==0.14.25", "llama-index-llms-openai-like==0.8.1",
            "llama-index-embeddings-openai-like==0.4.0",
        ),
        ("check_llama_index.py",), ALL,
    ),
    Client("instructor", ("instructor==1.17.0",), ("check_instructor.py",)),
    Client("lm-eval", ("lm-eval[api]==0.4.13", "transformers==5.23.0"), ("check_lm_eval.py",)),
    Client("GuideLLM", ("guidellm==0.8.1",), ("check_guidellm.py",), variable="GUIDELLM_PYTHON"),
    Client(
        "AIPerf", ("aiperf==0.13.0",), ("check_aiperf.py",), ("chat", "embedding"), variable="AIPERF_PYTHON"
    ),
    Client("vllm bench serve", (), ("check_vllm_bench.py",), ("chat", "embedding"), variable="VLLM_PYTHON"),
)  # fmt: skip


def selected(names: str) -> Sequence[Client]:
    """The clients that CLIENTS=… names, separated by commas; all of them for an empty text.

    Raises ValueError for an unknown name.
    """
    wanted = [one.strip() for one in names.split(",") if one.strip()]
    known = {client.key: client for client in CLIENTS}
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"CLIENTS={names}: there is no {', '.join(unknown)}; the clients are {', '.join(known)}")
    return [known[name] for name in wanted] if wanted else CLIENTS
