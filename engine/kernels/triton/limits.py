"""Shapes of attention that the Triton kernels don't compute; does not import triton."""

MAX_HEAD_DIM = 256  # the largest of the tile tables in `tiles`
MAX_GROUP = 128  # query heads of a KV head: one token of them fills the largest tile


def attention_refusal(heads: int, kv_heads: int, head_dim: int) -> str | None:
    """Why the attention of a layer of this shape needs the kernel in torch; None if it does not.

    Args:
        heads, kv_heads: of a rank.
        head_dim: of keys, and of values padded to them.
    """
    if head_dim % 2:
        return f"its heads have {head_dim} elements, an odd number"
    if head_dim > MAX_HEAD_DIM:
        return f"its heads have {head_dim} elements, more than {MAX_HEAD_DIM}"
    if heads // kv_heads > MAX_GROUP:
        return f"{heads // kv_heads} heads share a KV head, more than {MAX_GROUP}"
    return None
