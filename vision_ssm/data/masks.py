"""Binary masks as COCO stores them: polygons along the pixels' edges, and run lengths."""

from collections import defaultdict

import numpy as np

_TURNS = ((0, 1), (1, 0), (0, -1), (-1, 0))  # row and column steps: right, down, left, up


def _loops(mask: np.ndarray) -> list[np.ndarray]:
    """Outlines of the 4-connected regions, each (N, 2) row and column: regions clockwise, holes the other way."""
    padded = np.pad(mask, 1)
    # A directed edge has the mask on its right: along the top of a pixel to the right, down its right side, and so on.
    inside = padded[1:-1, 1:-1]
    starts: dict[tuple[int, int], list[int]] = defaultdict(list)
    outside = (padded[:-2, 1:-1], padded[1:-1, 2:], padded[2:, 1:-1], padded[1:-1, :-2])  # above, right, below, left
    corner = ((0, 0), (0, 1), (1, 1), (1, 0))
    for turn in range(4):
        rows, columns = np.nonzero(inside & ~outside[turn])
        for row, column in zip((rows + corner[turn][0]).tolist(), (columns + corner[turn][1]).tolist()):
            starts[row, column].append(turn)
    loops = []
    for first in list(starts):
        while starts[first]:
            place, turn = first, starts[first].pop()
            origin, corners = turn, []
            while True:
                place = (place[0] + _TURNS[turn][0], place[1] + _TURNS[turn][1])
                if place == first and (turn + 1) % 4 not in starts[place]:
                    if turn != origin:
                        corners.append(place)
                    break
                # Where two regions touch at a corner, the right turn stays with the region at hand.
                following = (turn + 1) % 4 if (turn + 1) % 4 in starts[place] else starts[place][0]
                starts[place].remove(following)
                if following != turn:
                    corners.append(place)
                turn = following
            loops.append(np.array(corners))
    return loops


def _signed_area(loop: np.ndarray) -> float:
    rows, columns = loop.T.astype(np.float64)
    return 0.5 * float(np.dot(columns, np.roll(rows, -1)) - np.dot(rows, np.roll(columns, -1)))


def mask_polygons(mask: np.ndarray) -> list[list[int]]:
    """Polygons that tile a mask exactly.

    Polygons of COCO have no holes, so a mask with a hole is cut through the hole's middle column.

    Args:
        mask: (H, W) bool.

    Returns:
        One flat list x0, y0, x1, y1, ... per piece, clockwise, on the corners of pixels: the first pixel of a row or
        column reaches from 0 to 1. Pieces that touch at a corner only are separate. Empty for an empty mask.
    """
    loops = _loops(mask)
    hole = next((loop for loop in loops if _signed_area(loop) < 0), None)
    if hole is None:
        return [loop[:, ::-1].reshape(-1).tolist() for loop in loops]  # (N, 2) -> (2N,)
    cut = int(hole[:, 1].min() + hole[:, 1].max()) // 2
    left, right = mask.copy(), mask.copy()
    left[:, cut:] = False
    right[:, :cut] = False
    return mask_polygons(left) + mask_polygons(right)


def mask_runs(mask: np.ndarray) -> dict[str, list[int]]:
    """COCO's uncompressed run lengths of a mask (H, W) bool: down the columns, zeros first."""
    flat = mask.reshape(-1, order="F")  # (H, W) -> (W * H,)
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return {"counts": ([0] if flat[0] else []) + counts, "size": list(mask.shape)}


def mask_box(mask: np.ndarray) -> list[int]:
    """x, y, width and height of the smallest box around a mask (H, W) bool that is not empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x, y = int(columns[0]), int(rows[0])
    return [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]
