"""Finds out whether a model pools, and how: from its config, the files of sentence-transformers, and the flags."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.errors import ConfigError, ModelError
from engine.model.families import is_encoder
from engine.multimodal.families import MM_FAMILIES
from engine.pooling import HOW_TO_EMBED, POOLING_TYPES, Activation, Method, PoolingSpec, Task

CLASSIFIER = "ForSequenceClassification"
MODULES = "modules.json"
# By the last part of its type, what a module of sentence-transformers does. All others are refused.
KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")
# The switches of sentence-transformers' pooling.
MODES: dict[str, Method] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}
# Flags that decoders have also if they pool.
OF_DECODERS = ("--pp", "--quantization", "--kv-cache-dtype", "--num-layers")
# Parts of V1 without which requests that pool do not run: the core would tokenize, or workers would keep no state.
NEEDED = ("inline-frontend", "full-state")


def read_pooling(config: EngineConfig, path: Path, hf_config: Any) -> PoolingSpec | None:
    """How a model pools; None if it generates.

    As in vLLM, `--runner auto` takes pooling for encoders, for classes named …Model or …ForSequenceClassification,
    and for folders of sentence-transformers.

    Raises ModelError for a model that can't pool in this way, ConfigError for flags that contradict it.
    """
    names = [str(name) for name in getattr(hf_config, "architectures", None) or ()]
    classifies = any(name.endswith(CLASSIFIER) for name in names)
    modules = _sentence_modules(path)
    pools = classifies or is_encoder(hf_config) or "Pooling" in modules or any(map(_is_base_class, names))
    if config.runner == "generate" and is_encoder(hf_config):
        raise ModelError(
            f"{config.model} can't generate: {hf_config.model_type} is an encoder, whose tokens attend to those after "
            "them (--runner pooling)"
        )
    if config.runner == "generate" or (config.runner == "auto" and config.convert in ("auto", "none") and not pools):
        if config.convert in ("embed", "classify"):
            raise ConfigError(f"--convert {config.convert} needs --runner pooling (or auto), not generate")
        return None
    if config.convert == "none" and not pools:
        raise ConfigError(f"{config.model} is a model that generates: --runner pooling needs --convert embed")
    _check_options(config, encoder=is_encoder(hf_config))
    _check_class(config, hf_config)
    task: Task = "classify" if config.convert == "classify" or (classifies and config.convert != "embed") else "embed"
    if task == "classify":
        return _classifier(config, hf_config, classifies=classifies)
    return _embedder(config, path, hf_config, modules)


def with_tied_head(hf_config: Any) -> Any:
    """The config of a model that pools: a decoder's head, which checkpoints for embedding lack, needs no weights."""
    if not is_encoder(hf_config):
        hf_config.tie_word_embeddings = True
    return hf_config


def _is_base_class(name: str) -> bool:
    return name.endswith("Model") and not name.endswith(("LMHeadModel", "ChatModel"))


def _check_class(config: EngineConfig, hf_config: Any) -> None:
    """Raise ModelError for models whose hidden states are computed in another way than those of text decoders."""
    if hf_config.model_type in MM_FAMILIES:
        raise ModelError(f"{config.model} takes images, audio or video: embeddings of such models aren't supported")
    causal = getattr(hf_config, "is_causal", None) is not False
    if not is_encoder(hf_config) and (not causal or getattr(hf_config, "use_bidirectional_attention", None) is True):
        raise ModelError(
            f"{config.model}: a decoder whose tokens attend to those after them isn't supported (is_causal, "
            "use_bidirectional_attention)"
        )


def _check_options(config: EngineConfig, *, encoder: bool) -> None:
    """Raise ConfigError for options that only generation has, or only decoders."""
    needless = {
        "--speculative": config.speculative,
        "--lora": config.adapters,
        "--tp": config.tensor_parallel_size > 1,
        "--pp": config.pipeline_parallel_size > 1,
        "--quantization": config.quantization,
        "--kv-cache-dtype": config.kv_cache_dtype,
        "--num-layers": config.num_layers,
    }
    if not encoder:
        needless = {flag: value for flag, value in needless.items() if flag not in OF_DECODERS}
    for flag, value in needless.items():
        if value:
            which = " and are encoders" if flag in OF_DECODERS else ""
            raise ConfigError(f"{flag} does not work with models that return embeddings or scores{which}: leave it out")
    for ablation in NEEDED:
        if ablation in config.ablations:
            given = "--engine v0" if config.engine == "v0" else f"--ablate {ablation}"
            raise ConfigError(f"{given} does not work with models that return embeddings or scores: leave it out")


def _classifier(config: EngineConfig, hf_config: Any, *, classifies: bool) -> PoolingSpec:
    if not classifies:
        raise ModelError(
            f"{config.model} has no classification head (an architecture named …{CLASSIFIER}): {HOW_TO_EMBED} "
            "serves embeddings"
        )
    if config.pooler_config:
        raise ConfigError("--pooler-config does not apply to models with a classification head: leave it out")
    labels = int(hf_config.num_labels)
    if labels != 1:
        raise ModelError(
            f"{config.model} has a classification head with {labels} labels: only heads with one, whose score is that "
            f"of a pair of texts, are supported ({HOW_TO_EMBED} serves embeddings)"
        )
    encoder = is_encoder(hf_config)
    activation = _activation(config, hf_config)
    return PoolingSpec(
        "classify",
        "head" if encoder else "last",
        1,
        encoder,
        normalize=False,
        activation=activation,
        label=str((getattr(hf_config, "id2label", None) or {}).get(0, "")),
    )


def _activation(config: EngineConfig, hf_config: Any) -> Activation:
    """What cross-encoders of sentence-transformers name; without a name it is a sigmoid.

    Raises ModelError for another function.
    """
    newer = getattr(hf_config, "sentence_transformers", None)
    named = newer.get("activation_fn") if isinstance(newer, Mapping) else None
    named = named or getattr(hf_config, "sbert_ce_default_activation_function", None)
    if named is None:
        return "sigmoid"
    last = str(named).rpartition(".")[2]
    if last == "Identity":
        return "none"
    if last == "Sigmoid":
        return "sigmoid"
    raise ModelError(f"{config.model}: the activation of its scores, {named}, isn't supported")


def _embedder(config: EngineConfig, path: Path, hf_config: Any, modules: list[str]) -> PoolingSpec:
    decoder = hf_config.get_text_config(decoder=True)
    encoder = is_encoder(hf_config)
    default: Method = "cls" if encoder else "last"
    method, normalize = (_method(config, path), "Normalize" in modules) if modules else (default, True)
    method, normalize = _with_flags(config, method, normalize)
    settings = _read_object(path / "sentence_bert_config.json")
    most = settings.get("max_seq_length")
    dimensions = tuple(getattr(hf_config, "matryoshka_dimensions", None) or ())
    return PoolingSpec(
        "embed",
        method,
        int(decoder.hidden_size),
        encoder,
        normalize=normalize,
        matryoshka=bool(dimensions or getattr(hf_config, "is_matryoshka", False)),
        dimensions=dimensions,
        lowercase=bool(settings.get("do_lower_case")),
        most_tokens=most if isinstance(most, int) and most > 0 else 0,
    )


def _sentence_modules(path: Path) -> list[str]:
    """The kinds of modules that sentence-transformers would run; none for another model.

    Raises ModelError if one isn't known.
    """
    file = path / MODULES
    if not file.is_file():
        return []
    listed = _read(file)
    kinds = [str(one.get("type", "")).rpartition(".")[2] for one in listed if isinstance(one, dict)]
    unknown = [kind for kind in kinds if kind not in KNOWN_MODULES]
    if unknown:
        raise ModelError(f"{file}: modules of type {', '.join(unknown)} aren't supported")
    return kinds


def _method(config: EngineConfig, path: Path) -> Method:
    """The pooling that the folder of the module declares."""
    places = [str(one.get("path", "")) for one in _read(path / MODULES) if str(one.get("type", "")).endswith("Pooling")]
    if not places:
        raise ModelError(f"{config.model}: {MODULES} has no pooling, so there is no embedding of a text")
    declared = _read_object(path / places[0] / "config.json")
    chosen = [name for name, value in declared.items() if name.startswith("pooling_mode_") and value is True]
    if len(chosen) != 1 or chosen[0] not in MODES:
        raise ModelError(
            f"{config.model}: its pooling is {' and '.join(chosen) or 'not declared'}; supported is one of "
            f"{', '.join(MODES)} (--pooler-config replaces it)"
        )
    return MODES[chosen[0]]


def _with_flags(config: EngineConfig, method: Method, normalize: bool) -> tuple[Method, bool]:
    """Apply --pooler-config."""
    given = config.pooler_config or {}
    assert not isinstance(given, str), "EngineConfig has read the JSON text"
    kind = given.get("pooling_type", given.get("seq_pooling_type"))
    normalizes = given.get("normalize", given.get("use_activation"))
    if kind is not None:
        method = POOLING_TYPES[str(kind).upper()]
    return method, normalize if normalizes is None else bool(normalizes)


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} can't be read as JSON: {error}") from error


def _read_object(file: Path) -> dict[str, Any]:
    """The object in a file; empty if there is no file."""
    found = _read(file) if file.is_file() else {}
    if not isinstance(found, dict):
        raise ModelError(f"{file} has no JSON object")
    return found
