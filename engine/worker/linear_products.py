"""Products of activations with the weights of linears on a device: y = x W^T + bias.

The form of a weight is chosen once, when it is loaded: as it is, or as `--quantization` says. A step calls an object.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn import functional

from engine.model.linears import quantizable_linears
from engine.worker.fused_stack import release


class Product(Protocol):
    """One linear."""

    def __call__(self, x: Tensor) -> Tensor:
        """y for x [rows, inputs], whose rows may be apart: [rows, outputs], contiguous, in the dtype of x."""
        ...


class ProductFormat(Protocol):
    """The form of weights: makes their products."""

    def refusal(self, outputs: int, inputs: int) -> str | None:
        """Why a weight [outputs, inputs] can't have this form; None if it can."""
        ...

    def make(self, weight: Tensor, bias: Tensor | None) -> Product:
        """The product with a weight [outputs, inputs] and a bias [outputs], which are on the device."""
        ...


@dataclass(frozen=True, slots=True)
class PlainProduct:
    """Implements `Product` by torch."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class PlainFormat:
    """Implements `ProductFormat`: weights in the model's dtype."""

    def refusal(self, outputs: int, inputs: int) -> str | None:  # noqa: ARG002
        return None

    def make(self, weight: Tensor, bias: Tensor | None) -> PlainProduct:
        return PlainProduct(weight, bias)


@dataclass(frozen=True, slots=True)
class LinearFormats:
    """The forms of a model's linears; all else stays in the model's dtype."""

    layers: ProductFormat
    head: ProductFormat

    def refusal(self, model: Any) -> str | None:
        """Why the linears of a transformers model can't have these forms; None if they can."""
        linears = quantizable_linears(model)
        if isinstance(linears, str):
            return linears
        for path, linear in linears.items():
            reason = self.of(linear, model).refusal(linear.out_features, linear.in_features)
            if reason is not None:
                return f"{path}: {reason}"
        return None

    def of(self, linear: nn.Linear, model: Any) -> ProductFormat:
        return self.head if linear is model.get_output_embeddings() else self.layers


PLAIN = LinearFormats(PlainFormat(), PlainFormat())


def quantize_linears(model: Any, formats: LinearFormats, fill: Callable[[nn.Module], None]) -> None:
    """Let the linears of a transformers model compute by products; they lose their weights. PLAIN changes nothing.

    Args:
        formats: without a `refusal`.
        fill: loads the weights of a module that has none yet on the device.
    """
    linears = quantizable_linears(model)
    if formats is PLAIN or isinstance(linears, str):
        return
    embedding = model.get_input_embeddings().weight
    for linear in linears.values():
        tied = linear.weight is embedding
        fill(linear)
        bias = None if linear.bias is None else linear.bias.detach()
        product = formats.of(linear, model).make(linear.weight.detach(), bias)
        linear.forward = ProductForward(product)  # type: ignore[method-assign, assignment]
        if tied:  # the embedding needs it
            linear.weight = nn.Parameter(linear.weight.new_empty(0), requires_grad=False)
        else:
            release(linear)


@dataclass(frozen=True, slots=True)
class ProductForward:
    """In place of the `forward` of a linear, whose hooks and shape remain."""

    product: Product

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
