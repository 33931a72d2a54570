"""`python -m engine.model.convert_gguf FILE FOLDER` converts a GGUF file to bfloat16 safetensors, config, tokenizer."""

import sys
from pathlib import Path

from engine.pretrained import NO_REMOTE_CODE


def convert(gguf: Path, folder: Path) -> None:
    """Write the model and its tokenizer, chat template included, into an existing folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, **NO_REMOTE_CODE, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    # What transformers keeps of the file's quantization; the weights written here are plain.
    for leftover in ("quantization_config", "_pre_quantization_dtype"):
        model.config.__dict__.pop(leftover, None)
    for leftover in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(leftover, None)
    tokenizer = AutoTokenizer.from_pretrained(**source, **NO_REMOTE_CODE)
    model.config.eos_token_id = tokenizer.eos_token_id
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
