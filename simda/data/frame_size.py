"""From a stored picture to the frame that is asked for: orientation, pixel aspect, centre crop, resize.

One way for all decoders and for still images, so that a size means the same everywhere. Reading files is
`video_io.py`'s business.
"""

from __future__ import annotations

import numpy as np
from PIL import Image


def fit_frame(frame: np.ndarray, height_px: int, width_px: int, pixel_aspect: float = 1.0) -> np.ndarray:
    """Scale a picture to cover `height_px` x `width_px`, keep its aspect, cut off what stands out evenly on both sides.

    Bicubic with antialiasing (Pillow widens the kernel when it shrinks), crop and scaling in one resampling.

    Args:
        frame: uint8 [height, width, 3].
        pixel_aspect: width of a stored pixel over its height.

    Returns:
        uint8 [height_px, width_px, 3].
    """
    stored_height, stored_width = frame.shape[:2]
    if (stored_height, stored_width) == (height_px, width_px) and pixel_aspect == 1.0:
        return np.ascontiguousarray(frame)
    shown_width = stored_width * pixel_aspect
    scale = max(height_px / stored_height, width_px / shown_width)
    crop_height, crop_width = height_px / scale, width_px / scale / pixel_aspect
    top, left = (stored_height - crop_height) / 2, (stored_width - crop_width) / 2
    # Rounding may put an edge a hair outside the picture, which Pillow refuses.
    box = (max(left, 0.0), max(top, 0.0), min(left + crop_width, stored_width), min(top + crop_height, stored_height))
    image = Image.fromarray(np.ascontiguousarray(frame))
    return np.asarray(image.resize((width_px, height_px), Image.Resampling.BICUBIC, box=box))


def orient_frame(frame: np.ndarray, rotation_deg: int, flipped: bool) -> np.ndarray:
    """Turn a stored picture upright.

    Args:
        frame: [height, width, 3].
        rotation_deg: counter-clockwise, a multiple of 90.
        flipped: whether it is mirrored top to bottom before it is turned.
    """
    return np.rot90(frame[::-1] if flipped else frame, rotation_deg // 90)


def shown_size(height_px: int, width_px: int, pixel_aspect: float, rotation_deg: int) -> tuple[int, int]:
    """(height, width) on the screen, in pixels, of a stored picture; its height is kept and its width stretched."""
    width_px = max(1, round(width_px * pixel_aspect))
    return (width_px, height_px) if rotation_deg % 180 else (height_px, width_px)


def orientation_of_matrix(matrix: np.ndarray) -> tuple[int, bool]:
    """What a container's display matrix asks for.

    Args:
        matrix: int32 [9], fixed point, row by row (ISO/IEC 14496-12, 8.2.2): x' = a x + c y, y' = b x + d y with
            a, b, c, d at 0, 1, 3, 4.

    Returns:
        (rotation_deg, flipped) for `orient_frame`: 0, 90, 180 or 270 counter-clockwise; upright for a damaged matrix.
    """
    a, b, c, d = (float(matrix[i]) for i in (0, 1, 3, 4))
    determinant = a * d - b * c
    if determinant == 0:
        return 0, False
    angle_deg = -np.degrees(np.arctan2(b, a))
    return int(round(angle_deg / 90) * 90) % 360, determinant < 0
