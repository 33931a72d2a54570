"""Images that are divided into tiles, one of several resolutions chosen by the sides' ratio (LLaVA-NeXT, OneVision).

The image is resized to fit the best resolution and padded; each tile goes through the tower. Rows and columns of
patches that are only padding are dropped afterwards, and each row gets an embedding for its end:

    tiles of 2 x 2 patches, image 4 wide and 2 high        whole image . . . .
    in a resolution of 2 x 2 tiles                         row 1       . . . . end
                                                           row 2       . . . . end
"""

from collections.abc import Sequence

from engine.multimodal.processors.patch_grid import PatchGrid

Size = tuple[int, int]  # height, width


def best_resolution(size: Size, resolutions: Sequence[Sequence[int]]) -> Size:
    """The resolution in which an image of `size` pixels has the most pixels, and of those the smallest."""
    from transformers.image_processing_utils import select_best_resolution

    height, width = select_best_resolution(size, [tuple(one) for one in resolutions])
    return int(height), int(width)


def tiles_of(resolution: Size, size: int) -> int:
    """The tiles of a resolution, each of `size` x `size` pixels."""
    return -(-resolution[0] // size) * -(-resolution[1] // size)


def full_patches(resolution: Sequence[int], grid: PatchGrid) -> Size:
    """Rows and columns of patches of all tiles."""
    height, width = resolution
    return grid.patches * (height // grid.size), grid.patches * (width // grid.size)


def unpadded_patches(size: Size, resolution: Size, grid: PatchGrid) -> Size:
    """Rows and columns of patches of the tiles that the image, not padding, covers.

    Rounded as transformers' classes do, which drop the same number of patches on both sides.
    """
    height, width = size
    rows, columns = full_patches(resolution, grid)
    if width / height > columns / rows:
        covered = int(round(height * (columns / width), 7))
        return rows - (rows - covered) // 2 * 2, columns
    covered = int(round(width * (rows / height), 7))
    return rows, columns - (columns - covered) // 2 * 2
