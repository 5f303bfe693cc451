"""From a stored picture to the frame that is asked for: orientation, pixel aspect, centre crop, resize.

One way for all decoders and for still images, so that a size means the same everywhere. Reading files is
`video_io.py`'s business.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Crop:
    """Which part of a picture is shown.

    Attributes:
        side: side of the part over that of the largest one of its aspect ratio, above 0 and at most 1.
        top, left: where it lies, from 0 (at the top, at the left) to 1 (at the bottom, at the right).
        mirrored: whether left and right are changed.
    """

    side: float = 1.0
    top: float = 0.5
    left: float = 0.5
    mirrored: bool = False


CENTRE = Crop()


def draw_crop(seed: int, min_side: float, may_mirror: bool) -> Crop:
    """A crop by chance, the same for the same arguments.

    Args:
        min_side: least side, see `Crop`; sides and places are uniform.
        may_mirror: whether every second one is mirrored.
    """
    rng = np.random.default_rng(seed)
    side, top, left = rng.uniform(min_side, 1), rng.random(), rng.random()
    return Crop(float(side), float(top), float(left), bool(rng.random() < 0.5) and may_mirror)


def fit_frame(
    frame: np.ndarray, height_px: int, width_px: int, pixel_aspect: float = 1.0, crop: Crop = CENTRE
) -> np.ndarray:
    """Scale a picture to cover `height_px` x `width_px`, keep its aspect, cut off what stands out.

    Bicubic with antialiasing (Pillow widens the kernel when it shrinks), crop and scaling in one resampling.

    Args:
        frame: uint8 [height, width, 3].
        pixel_aspect: width of a stored pixel over its height.
        crop: what is kept; by default as much as can be, cut evenly on both sides.

    Returns:
        uint8 [height_px, width_px, 3].
    """
    stored_height, stored_width = frame.shape[:2]
    if (stored_height, stored_width) == (height_px, width_px) and pixel_aspect == 1.0 and crop == CENTRE:
        return np.ascontiguousarray(frame)
    shown_width = stored_width * pixel_aspect
    scale = max(height_px / stored_height, width_px / shown_width)
    crop_height, crop_width = crop.side * height_px / scale, crop.side * width_px / scale / pixel_aspect
    top, left = (stored_height - crop_height) * crop.top, (stored_width - crop_width) * crop.left
    # Rounding may put an edge a hair outside the picture, which Pillow refuses.
    box = (max(left, 0.0), max(top, 0.0), min(left + crop_width, stored_width), min(top + crop_height, stored_height))
    image = Image.fromarray(np.ascontiguousarray(frame))
    fitted = np.asarray(image.resize((width_px, height_px), Image.Resampling.BICUBIC, box=box))
    return fitted[:, ::-1] if crop.mirrored else fitted


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
