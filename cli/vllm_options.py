"""Flags of `vllm serve` that Redline does not implement: accepted without effect, or refused with a reason.

A command line written for vLLM thus runs as intended or names the flag that prevents it. `docs/serving/flags.md` lists
all flags of vLLM 0.8 to 0.32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click

from cli.options import option

VLLM = "Other flags of vLLM"
NOTES = "cli.vllm_options.notes"


@dataclass(frozen=True, slots=True)
class Foreign:
    """One flag of vLLM."""

    names: tuple[str, ...]  # as click takes them
    why: str  # the reason why it has no effect or is refused
    takes_value: bool = True  # False: a switch
    neutral: tuple[str, ...] = ()  # values that equal what Redline does anyway; accepted silently
    refused: bool = False  # other values are an error instead of a note

    @property
    def name(self) -> str:
        """The name to show in messages."""
        return next(name for name in self.names if name.startswith("--")).partition("/")[0]


def _no_effect(*names: str, why: str, switch: bool = False, neutral: tuple[str, ...] = ()) -> Foreign:
    return Foreign(names, why, not switch, neutral)


def _refused(*names: str, why: str, switch: bool = False, neutral: tuple[str, ...] = ()) -> Foreign:
    return Foreign(names, why, not switch, neutral, True)


COMPILE = "nothing is compiled by torch.compile"
GRAPHS = "which steps are captured follows from --max-num-seqs and --max-num-batched-tokens"
ADAPTERS = "adapters of any number and rank are served, within memory"
IN_CPU_MEMORY = "weights and KV cache are in CPU memory, and preempted requests are recomputed"
NO_CODE = "code that comes with a model is never run; models that transformers has a class for need none"
ONE_COMMAND = "one command serves; other machines are nodes of a Ray cluster (--distributed-executor-backend ray)"
NO_PLUGINS = "no external code is loaded into the server"
ONE_BACKEND = "llguidance is the only backend"
NO_CLIENT_CERTIFICATES = "client certificates are not checked; a reverse proxy can check them"
SPECULATION = "use --speculative ngram and --num-speculative-tokens"

NO_EFFECT = (
    _no_effect("--compilation-config", "-O", why=COMPILE),
    _no_effect("--optimization-level", why=COMPILE),
    _no_effect("--max-seq-len-to-capture", why=GRAPHS),
    _no_effect("--cuda-graph-sizes", why=GRAPHS),
    _no_effect("--cudagraph-capture-sizes", why=GRAPHS),
    _no_effect("--max-cudagraph-capture-size", why=GRAPHS),
    _no_effect("--swap-space", why=IN_CPU_MEMORY, neutral=("0",)),
    _no_effect("--cpu-offload-gb", why=IN_CPU_MEMORY, neutral=("0",)),
    _no_effect("--preemption-mode", why=IN_CPU_MEMORY, neutral=("recompute",)),
    _no_effect("--enable-lora/--no-enable-lora", why="adapters given by --lora are served without it", switch=True),
    _no_effect("--max-loras", why=ADAPTERS),
    _no_effect("--max-lora-rank", why=ADAPTERS),
    _no_effect("--max-cpu-loras", why=ADAPTERS),
    _no_effect("--lora-dtype", why="adapters have the model's data type", neutral=("auto",)),
    _no_effect("--disable-custom-all-reduce", why="ranks use gloo", switch=True),
    _no_effect("--disable-frontend-multiprocessing", why="the EngineCore is always its own process", switch=True),
    _no_effect("--max-log-len", why="prompts are not logged"),
    _no_effect("--uvicorn-log-level", why="uvicorn's log is not shown; each request has a line of JSON"),
    _no_effect("--disable-uvicorn-access-log", why="there is no access log", switch=True),
    _no_effect("--disable-fastapi-docs", why="--no-page switches them off", switch=True),
    _no_effect("--use-v2-block-manager", why="there is one block manager", switch=True),
    _no_effect("--async-scheduling/--no-async-scheduling", why="scheduling is always asynchronous "
               "(--ablate no-run-ahead turns it off)", switch=True),
    _no_effect("--disable-async-output-proc", why="detokenizing always runs next to the steps", switch=True),
    _no_effect("--max-num-partial-prefills", why="the number of prompts that share a step is not limited"),
    _no_effect("--max-long-partial-prefills", why="the number of prompts that share a step is not limited"),
    _no_effect("--long-prefill-token-threshold", why="the length of prompts that share a step is not limited"),
    _no_effect("--stream-interval", why="every token is sent as soon as it is computed", neutral=("1",)),
    _no_effect("--attention-backend", why="--kernels chooses the attention implementation"),
    _no_effect("--model-impl", why="--kernels chooses between the C++ kernels and transformers' class",
               neutral=("auto",)),
    _no_effect("--max-parallel-loading-workers", why="each rank reads only what it needs, in pieces"),
    _no_effect("--tokenizer-pool-size", why="texts are tokenized on threads", neutral=("0",)),
    _no_effect("--disable-hybrid-kv-cache-manager", why="blocks outside a sliding window are always freed",
               switch=True),
    _no_effect("--enable-prompt-tokens-details", why="responses always have prompt_tokens_details", switch=True),
    _no_effect("--enable-auto-tool-choice", why="the model may always choose to call a tool", switch=True),
    _no_effect("--enable-request-id-headers", why="responses always have X-Request-Id", switch=True),
    _no_effect("--prefix-caching-hash-algo", why="block hashes are always cryptographic"),
    _no_effect("--disable-cascade-attn", why="there is one attention implementation", switch=True),
    _no_effect("--use-tqdm-on-load/--no-use-tqdm-on-load", why="loading progress is always shown on a terminal",
               switch=True),
    _no_effect("--enable-server-load-tracking", why="/metrics always has the load", switch=True),
    _no_effect("--guided-decoding-backend", why=ONE_BACKEND),
    _no_effect("--structured-outputs-config", why=ONE_BACKEND),
)  # fmt: skip

REFUSED = (
    _refused("--media-io-kwargs", why="use --video-frames for the number of frames"),
    _refused("--trust-remote-code/--no-trust-remote-code", why=NO_CODE, switch=True),
    _refused("--code-revision", why=NO_CODE),
    _refused("--nnodes", why=ONE_COMMAND, neutral=("1",)),
    _refused("--headless", why=ONE_COMMAND, switch=True),
    _refused("--kv-transfer-config", why="the KV cache is not sent to other servers"),
    _refused("--enable-expert-parallel", "-ep", why="experts are divided among ranks by --tp only", switch=True),
    _refused("--speculative-config", "-sc", why=SPECULATION),
    _refused("--speculative-model", why=SPECULATION),
    _refused("--num-gpu-blocks-override", why="use --kv-cache-memory-bytes"),
    _refused("--task", why="use --runner and --convert", neutral=("auto", "generate")),
    _refused("--hf-config-path", why="the config must be in the model's folder; --hf-overrides changes its fields"),
    _refused("--skip-tokenizer-init", why="the server always tokenizes and detokenizes", switch=True),
    _refused("--revision", why="download that revision into a folder and serve the folder"),
    _refused("--tokenizer-revision", why="download that revision into a folder and give it as --tokenizer"),
    _refused("--download-dir", why="set the environment variable HF_HOME instead"),
    _refused("--uds", why="the server listens on TCP only; use --host and --port"),
    _refused("--config", why="flags are not read from a file"),
    _refused("--chat-template-content-format", why="the format is detected from the template",
             neutral=("auto",)),
    _refused("--default-chat-template-kwargs", why="set chat_template_kwargs in requests instead"),
    _refused("--middleware", why=NO_PLUGINS),
    _refused("--tool-parser-plugin", why=NO_PLUGINS),
    _refused("--logits-processors", why=NO_PLUGINS),
    _refused("--logits-processor-pattern", why=NO_PLUGINS),
    _refused("--tool-server", why="the server calls no tools itself"),
    _refused("--response-role", why="responses have the role assistant", neutral=("assistant",)),
    _refused("--return-tokens-as-token-ids", why="set \"return_tokens_as_token_ids\": true in requests instead",
             switch=True),
    _refused("--disable-sliding-window", why="sliding windows are part of the model; --max-model-len shortens requests",
             switch=True),
    _refused("--enable-sleep-mode", why="the server keeps its weights while it runs", switch=True),
    _refused("--enable-force-include-usage",
             why="set \"stream_options\": {\"include_usage\": true} in requests instead", switch=True),
    _refused("--ssl-ca-certs", why=NO_CLIENT_CERTIFICATES),
    _refused("--ssl-cert-reqs", why=NO_CLIENT_CERTIFICATES, neutral=("0",)),
)  # fmt: skip

FOREIGN = (*NO_EFFECT, *REFUSED)


def notes(ctx: click.Context) -> list[str]:
    """One line for each flag of this command line that has no effect."""
    found: list[str] = ctx.meta.get(NOTES, [])
    return found


def _callback(foreign: Foreign) -> Callable[[click.Context, click.Parameter, Any], None]:
    def note_or_refuse(ctx: click.Context, _param: click.Parameter, value: Any) -> None:
        if value is None or value == () or (not foreign.takes_value and value is False):
            return
        given = [str(one) for one in (value if isinstance(value, tuple) else (value,))]
        if foreign.takes_value and all(one in foreign.neutral for one in given):
            return
        what = f"{foreign.name} {given[-1]}" if foreign.neutral else foreign.name
        if foreign.refused:
            raise click.UsageError(f"{what} is not supported: {foreign.why}", ctx)
        ctx.meta.setdefault(NOTES, []).append(f"{what} has no effect: {foreign.why}")

    return note_or_refuse


def _option(foreign: Foreign) -> Callable[[Any], Any]:
    settings: dict[str, Any] = (
        {"multiple": True, "several": True} if foreign.takes_value else {"is_flag": True, "default": None}
    )
    return option(
        VLLM, *foreign.names, expose_value=False, hidden=True, callback=_callback(foreign), help=foreign.why, **settings
    )


VLLM_OPTIONS = tuple(_option(foreign) for foreign in FOREIGN)
