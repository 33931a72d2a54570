"""Flags of `vllm serve` that Redline hasn't got: accepted where they change nothing here, else refused with the reason.

A printed command should either do what it says or name what it can't do. `docs/serving/flags.md` lists all of them
beside those that Redline has; the versions gone through are 0.8 to 0.32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click

from cli.options import option

VLLM = "Taken from vLLM's commands"
NOTES = "cli.vllm_options.notes"


@dataclass(frozen=True, slots=True)
class Foreign:
    """One flag of vLLM's.

    names: as click takes them. why: why it changes nothing, or why it is refused. takes_value: it is no switch.
    neutral: values with which it asks for nothing that isn't so anyway; they pass in silence. refused: other values
    are an error, not a note.
    """

    names: tuple[str, ...]
    why: str
    takes_value: bool = True
    neutral: tuple[str, ...] = ()
    refused: bool = False

    @property
    def name(self) -> str:
        """As written in a message."""
        return next(name for name in self.names if name.startswith("--")).partition("/")[0]


def _no_effect(*names: str, why: str, switch: bool = False, neutral: tuple[str, ...] = ()) -> Foreign:
    return Foreign(names, why, not switch, neutral)


def _refused(*names: str, why: str, switch: bool = False, neutral: tuple[str, ...] = ()) -> Foreign:
    return Foreign(names, why, not switch, neutral, True)


GRAPHS = "no graphs are captured and nothing is compiled on the CPU"
ADAPTERS = "adapters of any number and rank are served, as far as memory goes"
COPIES = "weights and KV cache are in the CPU's memory anyway, and preempted requests are computed again"
TOOLS = "tool calls aren't read from what a model writes"
NO_CODE = "code that comes with a model is never run; kinds of model that transformers has a class for need none"
ONE_MACHINE = "one server runs on one machine"
SPECULATION = "use --speculative ngram and --num-speculative-tokens"

NO_EFFECT = (
    _no_effect("--enforce-eager/--no-enforce-eager", why=GRAPHS, switch=True),
    _no_effect("--compilation-config", "-O", why=GRAPHS),
    _no_effect("--optimization-level", why=GRAPHS),
    _no_effect("--max-seq-len-to-capture", why=GRAPHS),
    _no_effect("--cuda-graph-sizes", why=GRAPHS),
    _no_effect("--cudagraph-capture-sizes", why=GRAPHS),
    _no_effect("--max-cudagraph-capture-size", why=GRAPHS),
    _no_effect("--swap-space", why=COPIES, neutral=("0",)),
    _no_effect("--cpu-offload-gb", why=COPIES, neutral=("0",)),
    _no_effect("--preemption-mode", why=COPIES, neutral=("recompute",)),
    _no_effect("--enable-lora/--no-enable-lora", why="adapters given by --lora are served without it", switch=True),
    _no_effect("--max-loras", why=ADAPTERS),
    _no_effect("--max-lora-rank", why=ADAPTERS),
    _no_effect("--max-cpu-loras", why=ADAPTERS),
    _no_effect("--lora-dtype", why="adapters are kept in the model's own type", neutral=("auto",)),
    _no_effect("--disable-custom-all-reduce", why="ranks share memory", switch=True),
    _no_effect("--disable-frontend-multiprocessing", why="the core is always a process of its own", switch=True),
    _no_effect("--max-log-len", why="no prompts are logged"),
    _no_effect("--uvicorn-log-level", why="uvicorn logs nothing here; requests have a line of JSON each"),
    _no_effect("--disable-uvicorn-access-log", why="there is no access log", switch=True),
    _no_effect("--disable-fastapi-docs", why="no pages of documentation are served", switch=True),
    _no_effect("--use-v2-block-manager", why="there is one block manager", switch=True),
    _no_effect("--async-scheduling/--no-async-scheduling", why="the next step is always planned while one runs "
               "(--ablate no-run-ahead takes that away)", switch=True),
    _no_effect("--disable-async-output-proc", why="texts are always made beside the steps", switch=True),
    _no_effect("--max-num-partial-prefills", why="prompts share a step's budget without a limit of their number"),
    _no_effect("--max-long-partial-prefills", why="prompts share a step's budget without a limit of their number"),
    _no_effect("--long-prefill-token-threshold", why="prompts share a step's budget without a limit of their length"),
    _no_effect("--stream-interval", why="each token is sent as it comes", neutral=("1",)),
    _no_effect("--attention-backend", why="--kernels chooses the instructions of the one attention"),
    _no_effect("--model-impl", why="--kernels chooses between the fused stack and transformers' class",
               neutral=("auto",)),
    _no_effect("--max-parallel-loading-workers", why="a rank reads what it needs, a piece at a time"),
    _no_effect("--tokenizer-pool-size", why="texts are tokenized on threads", neutral=("0",)),
    _no_effect("--mm-processor-cache-gb", why="no model with images is served yet"),
    _no_effect("--limit-mm-per-prompt", why="no model with images is served yet"),
    _no_effect("--mm-processor-kwargs", why="no model with images is served yet"),
    _no_effect("--disable-mm-preprocessor-cache", why="no model with images is served yet", switch=True),
    _no_effect("--disable-hybrid-kv-cache-manager", why="windows always give their blocks back", switch=True),
    _no_effect("--enable-prompt-tokens-details", why="no details of prompt tokens are reported", switch=True),
    _no_effect("--enable-request-id-headers", why="answers always carry X-Request-Id", switch=True),
    _no_effect("--prefix-caching-hash-algo", why="blocks are always named by a cryptographic hash"),
    _no_effect("--disable-cascade-attn", why="there is one attention", switch=True),
    _no_effect("--use-tqdm-on-load/--no-use-tqdm-on-load", why="a terminal always shows how far loading is",
               switch=True),
    _no_effect("--enable-server-load-tracking", why="/metrics always has the load", switch=True),
    _no_effect("--guided-decoding-backend", why="no grammars are followed yet; requests with one are refused"),
    _no_effect("--structured-outputs-config", why="no grammars are followed yet; requests with one are refused"),
)  # fmt: skip

REFUSED = (
    _refused("--trust-remote-code/--no-trust-remote-code", why=NO_CODE, switch=True),
    _refused("--code-revision", why=NO_CODE),
    _refused("--pipeline-parallel-size", "-pp", why="ranks share each layer: use --tp", neutral=("1",)),
    _refused("--distributed-executor-backend", why=ONE_MACHINE, neutral=("mp", "uni")),
    _refused("--nnodes", why=ONE_MACHINE, neutral=("1",)),
    _refused("--headless", why=ONE_MACHINE, switch=True),
    _refused("--kv-transfer-config", why="KV cache isn't sent to other servers"),
    _refused("--enable-expert-parallel", "-ep", why="experts are divided among ranks by --tp alone", switch=True),
    _refused("--speculative-config", "-sc", why=SPECULATION),
    _refused("--speculative-model", why=SPECULATION),
    _refused("--num-gpu-blocks-override", why="use --kv-cache-memory-bytes"),
    _refused("--task", why="only generation is served", neutral=("auto", "generate")),
    _refused("--runner", why="only generation is served", neutral=("auto", "generate")),
    _refused("--convert", why="only generation is served", neutral=("auto", "none")),
    _refused("--hf-config-path", why="the config must lie in the model's folder; --hf-overrides changes its fields"),
    _refused("--skip-tokenizer-init", why="texts are always read and written", switch=True),
    _refused("--revision", why="fetch that revision into a folder and serve the folder"),
    _refused("--tokenizer-revision", why="fetch that revision into a folder and give it as --tokenizer"),
    _refused("--download-dir", why="the environment variable HF_HOME says where models are kept"),
    _refused("--uds", why="only TCP is served; use --host and --port"),
    _refused("--config", why="flags aren't read from a file"),
    _refused("--chat-template-content-format", why="what a template takes is found from the template",
             neutral=("auto",)),
    _refused("--default-chat-template-kwargs", why="requests give chat_template_kwargs"),
    _refused("--middleware", why="no further code is loaded into the server"),
    _refused("--tool-parser-plugin", why="no further code is loaded into the server"),
    _refused("--logits-processors", why="no further code is loaded into the server"),
    _refused("--logits-processor-pattern", why="no further code is loaded into the server"),
    _refused("--tool-server", why=TOOLS),
    _refused("--enable-auto-tool-choice", why=TOOLS, switch=True),
    _refused("--tool-call-parser", why=TOOLS),
    _refused("--reasoning-parser", why="reasoning isn't taken out of what a model writes"),
    _refused("--response-role", why="answers have the role assistant", neutral=("assistant",)),
    _refused("--return-tokens-as-token-ids", why="requests ask for it: \"return_token_ids\": true", switch=True),
    _refused("--disable-sliding-window", why="a model's windows are part of it; --max-model-len shortens requests",
             switch=True),
    _refused("--enable-sleep-mode", why="a server keeps its weights as long as it runs", switch=True),
    _refused("--enable-force-include-usage", why="requests ask for it: \"stream_options\": {\"include_usage\": true}",
             switch=True),
    _refused("--ssl-ca-certs", why="certificates of clients aren't checked; a proxy in front can"),
    _refused("--ssl-cert-reqs", why="certificates of clients aren't checked; a proxy in front can", neutral=("0",)),
)  # fmt: skip

FOREIGN = (*NO_EFFECT, *REFUSED)


def notes(ctx: click.Context) -> list[str]:
    """A line for each flag of this command line that changes nothing."""
    found: list[str] = ctx.meta.get(NOTES, [])
    return found


def _callback(foreign: Foreign) -> Callable[[click.Context, click.Parameter, Any], None]:
    def judge(ctx: click.Context, _param: click.Parameter, value: Any) -> None:
        if value is None or value == () or (not foreign.takes_value and value is False):
            return
        given = [str(one) for one in (value if isinstance(value, tuple) else (value,))]
        if foreign.takes_value and all(one in foreign.neutral for one in given):
            return
        what = f"{foreign.name} {given[-1]}" if foreign.neutral else foreign.name
        if foreign.refused:
            raise click.UsageError(f"{what} can't be had: {foreign.why}", ctx)
        ctx.meta.setdefault(NOTES, []).append(f"{what} has no effect: {foreign.why}")

    return judge


def _option(foreign: Foreign) -> Callable[[Any], Any]:
    settings: dict[str, Any] = (
        {"multiple": True, "several": True} if foreign.takes_value else {"is_flag": True, "default": None}
    )
    return option(
        VLLM, *foreign.names, expose_value=False, hidden=True, callback=_callback(foreign), help=foreign.why, **settings
    )


VLLM_OPTIONS = tuple(_option(foreign) for foreign in FOREIGN)
