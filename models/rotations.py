"""Matrices that turn images: by bilinear interpolation, and the orthogonal ones nearest to those."""

import numpy as np
from jaxtyping import Float
from scipy import sparse

__all__ = ["orthogonal_rotation", "rotation", "turned"]


def rotation(height: int, width: int, degrees: float) -> sparse.csr_array:
    """The (H * W, H * W) matrix that turns an image, pixels numbered row by row, counter-clockwise about its middle.

    Bilinear interpolation, zero outside the image; a row has at most four entries. With rows pointing down, the pixel
    (r, c) off the middle takes the value at (r cos a + c sin a, c cos a - r sin a).
    """
    angle = np.deg2rad(degrees)
    middle = (height - 1) / 2, (width - 1) / 2
    target = np.indices((height, width)).reshape(2, -1)
    down, right = target[0] - middle[0], target[1] - middle[1]
    source_row = np.cos(angle) * down + np.sin(angle) * right + middle[0]
    source_column = np.cos(angle) * right - np.sin(angle) * down + middle[1]
    # Where a position is a pixel but for rounding, it is that pixel: quarter turns are then exact.
    source_row, source_column = np.round(source_row, 9), np.round(source_column, 9)
    top, left = np.floor(source_row).astype(int), np.floor(source_column).astype(int)
    rows, columns, weights = [], [], []
    for row_offset, column_offset in ((0, 0), (0, 1), (1, 0), (1, 1)):
        row, column = top + row_offset, left + column_offset
        weight = (1 - np.abs(source_row - row)) * (1 - np.abs(source_column - column))
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width) & (weight > 0)
        rows.append(np.flatnonzero(inside))
        columns.append((row * width + column)[inside])
        weights.append(weight[inside])
    size = height * width
    entries = np.concatenate(weights).astype(np.float32)
    return sparse.csr_array((entries, (np.concatenate(rows), np.concatenate(columns))), shape=(size, size))


def orthogonal_rotation(height: int, width: int, degrees: float) -> Float[np.ndarray, "pixels pixels"]:
    """The orthogonal matrix O nearest to ``rotation(height, width, degrees)``, float64: its polar factor.

        O = argmin ||O - R||_F over O^T O = I = U V^T,   R = U diag(s) V^T

    As a kernel for the first layer: images turned by the angle are x_t = R x_{t-1}, and W_t = O W_{t-1} with the pixels as
    rows keeps x_t^T W_t = x_{t-1}^T R^T O W_{t-1}, equal to x_{t-1}^T W_{t-1} up to what the interpolation blurs and what
    leaves the image. Exact for quarter turns of square images, where R is a permutation. Angles add up only nearly:
    from angle a to angle b the step is ``O(b) @ O(a).T`` where the images are all turned from the upright ones.

    Args:
        height, width: of the image; pixels numbered row by row, D = height * width. The cost is one SVD of (D, D).
        degrees: counter-clockwise, finite.

    Raises:
        ValueError: a size below 1, an angle that is not finite.
    """
    if height < 1 or width < 1:
        raise ValueError(f"height and width are {height} and {width}; whole numbers >= 1 are accepted")
    if not np.isfinite(degrees):
        raise ValueError(f"degrees is {degrees}; a finite number is accepted")
    matrix = rotation(height, width, degrees).toarray()
    if degrees % 90 == 0 and height == width:
        return matrix.astype(np.float64)  # a permutation already, which an SVD would blur by rounding
    left, _, right = np.linalg.svd(matrix.astype(np.float64))
    return left @ right


def turned(x: Float[np.ndarray, "n h w *channels"], degrees: float) -> Float[np.ndarray, "n h w *channels"]:
    """Images turned by ``rotation``, each channel by itself."""
    if degrees == 0:
        return x
    count, height, width = x.shape[:3]
    pixels = np.moveaxis(x.reshape(count, height * width, -1), 1, 0)  # (pixels, n, channels)
    moved = rotation(height, width, degrees) @ pixels.reshape(height * width, -1)
    return np.ascontiguousarray(np.moveaxis(moved.reshape(pixels.shape), 0, 1)).reshape(x.shape)
