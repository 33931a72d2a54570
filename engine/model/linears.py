"""Which linears of a transformers model `--quantization` quantizes where its own class computes it."""

from typing import Any

from torch import nn


def quantizable_linears(model: Any) -> dict[str, nn.Linear] | str:
    """All linears by their paths, the head included; or why the model can't be quantized.

    Embeddings and what has one dimension stay in the model's dtype. Other large parameters, such as those of experts,
    would stay as well, so that such a model is refused.
    """
    found: dict[str, nn.Linear] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.ndim < 2 or isinstance(module, nn.Embedding):
                continue
            if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
                return f"its {path}.{name} does not belong to a linear"
            found[path] = module
    return found
