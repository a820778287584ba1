"""Small drawn pictures for trying pose estimation: jointed figures with the 17 keypoints of COCO.

A figure seen from the front has a face and its left limbs at the viewer's right; seen from behind it has hair instead
of a face and its left limbs at the viewer's left. The limbs' stripes are slanted like those of a barber's pole, by
opposite hands on the two sides. A mirror turns the one hand into the other, so a picture mirrored together with
exchanged left and right names is again a picture of this kind, as for photographs.
"""

from dataclasses import dataclass, field

import numpy as np

from vision_ssm.data.scenes import (
    SHAPES,
    UNLABELLED,
    Canvas,
    Part,
    Scene,
    blank,
    capsule,
    contrasting,
    has_crowd,
    is_empty,
    shape_part,
    wire_part,
)

PERSON = "person"
KEYPOINTS = (
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow",
    "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle",
    "right_ankle",
)
"""COCO's names in COCO's order."""
SKELETON = (
    (16, 14), (14, 12), (17, 15), (15, 13), (12, 13), (6, 12), (7, 13), (6, 7), (6, 8), (7, 9), (8, 10), (9, 11),
    (2, 3), (1, 2), (1, 3), (2, 4), (3, 5), (4, 6), (5, 7),
)
"""COCO's bones: pairs of keypoints, counted from 1."""
FAR_EVERY, FAR_AT = 10, 3
_HIDDEN, _VISIBLE = 1, 2
_PLACES = 16  # tries to find a place for a figure
_LEAST_VISIBLE = 0.6  # of a figure, whatever is drawn over it later
# Widths and lengths in units of the figure's height, about those of a stout person.
_LIMB = {"upper_arm": (0.042, 0.17), "forearm": (0.036, 0.16), "thigh": (0.052, 0.22), "shin": (0.042, 0.22)}
_SHOULDER, _HIP, _TORSO, _HEAD = 0.125, 0.08, 0.29, 0.085


@dataclass
class Figure:
    """Parts in painter's order, and where the joints are.

    Attributes:
        parts: What to paint.
        names: Name of each part.
        joints: (17, 2) x and y in pixels, also of joints outside of the picture.
        owners: For each keypoint the parts on which it can be seen.
    """

    parts: list[Part] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    joints: np.ndarray = field(default_factory=lambda: np.zeros((17, 2)))
    owners: tuple[tuple[str, ...], ...] = ()


def _turn(angle: float) -> np.ndarray:
    """(2, 2) matrix that turns a vector (x, y) by `angle`."""
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _pose(random: np.random.RandomState, facing: int) -> dict[str, np.ndarray]:
    """Joints in units of the figure's height about the middle of the hips, x to the viewer's right and y down.

    Args:
        random: Source of random numbers.
        facing: 1 from the front, -1 from behind.
    """
    lean = _turn(random.uniform(-0.2, 0.2))
    nod = lean @ _turn(random.uniform(-0.3, 0.3))
    chest = lean @ np.array([0.0, -_TORSO])
    head = chest + nod @ np.array([0.0, -_HEAD - 0.045])
    joints = {"head": head, "nose": head + nod @ np.array([0.0, 0.018])}
    for name, sign in (("left", facing), ("right", -facing)):
        joints[f"{name}_eye"] = head + nod @ np.array([sign * 0.034, -0.018])
        joints[f"{name}_ear"] = head + nod @ np.array([sign * _HEAD, 0.0])
        joints[f"{name}_shoulder"] = chest + lean @ np.array([sign * _SHOULDER, 0.0])
        joints[f"{name}_hip"] = lean @ np.array([sign * _HIP, 0.0])
        raised, bent = random.uniform(-0.2, 2.4), random.uniform(-1.6, 1.6)
        spread, knee = random.uniform(-0.1, 0.7), random.uniform(-0.8, 0.2)
        chain = (
            ("shoulder", "elbow", "upper_arm", raised), ("elbow", "wrist", "forearm", raised + bent),
            ("hip", "knee", "thigh", spread), ("knee", "ankle", "shin", spread + knee),
        )
        for start, end, limb, angle in chain:
            direction = np.array([sign * np.sin(angle), np.cos(angle)])
            joints[f"{name}_{end}"] = joints[f"{name}_{start}"] + _LIMB[limb][1] * (lean @ direction)
    return joints


def _limb(
    canvas: Canvas, start: np.ndarray, end: np.ndarray, half_width: float, hand: int,
    colours: tuple[np.ndarray, np.ndarray],
) -> Part:
    """A rounded bar with slanted stripes; `hand` 1 or -1 says which way they wind."""
    middle = (start + end) / 2
    window, dx, dy = canvas.window(middle, float(np.hypot(*(end - start))) / 2 + half_width + 1)
    distance, along, across = capsule(np.stack([dx, dy], -1), start - middle, end - middle, half_width)
    period = max(2.2 * half_width, 5.0)
    stripe = np.clip(0.5 + 1.5 * np.sin(2 * np.pi * (along + hand * across) / period), 0, 1)[..., None]
    return Part(window, distance, (1 - stripe) * colours[0] + stripe * colours[1])


def _disc(canvas: Canvas, centre: np.ndarray, radius: float, colour: np.ndarray) -> Part:
    window, dx, dy = canvas.window(centre, radius + 1)
    return Part(window, np.hypot(dx, dy) - radius, colour)


def _torso(canvas: Canvas, corners: np.ndarray, rounding: float, colour: np.ndarray) -> Part:
    """A rounded quadrangle; `corners` (4, 2), clockwise on the screen."""
    middle = corners.mean(0)
    window, dx, dy = canvas.window(middle, float(np.hypot(*(corners - middle).T).max()) + rounding + 1)
    edges = np.roll(corners, -1, 0) - corners
    normals = np.stack([edges[:, 1], -edges[:, 0]], -1) / np.hypot(*edges.T)[:, None]  # (4, 2), outward
    offsets = ((corners - middle) * normals).sum(-1)
    distance = np.max(np.stack([dx, dy], -1) @ normals.T - offsets, -1) - rounding
    shade = 1 - 0.3 * np.clip(np.abs(dx) / (4 * rounding), 0, 1) ** 2
    return Part(window, distance, colour * shade[..., None])


def figure(canvas: Canvas, centre: np.ndarray, height: float) -> Figure:
    """A figure in a random pose with random colours.

    Args:
        canvas: The picture; nothing is painted yet.
        centre: Middle of the hips (x, y), pixels.
        height: From head to foot when it stands straight, pixels.
    """
    random = canvas.random
    facing = -1 if random.rand() < 0.3 else 1
    turn = _turn(random.uniform(-0.35, 0.35))
    at = {name: centre + height * (turn @ joint) for name, joint in _pose(random, facing).items()}
    shirt = contrasting(random, canvas.ground)
    light, dark = np.full(3, 0.95), contrasting(random, canvas.ground, shirt, np.full(3, 0.95), least=0.6)
    skin = np.array([0.92, 0.74, 0.6]) * random.uniform(0.5, 1.05)
    hair = np.array([0.25, 0.15, 0.08]) * random.uniform(0.2, 1.6)
    result = Figure(joints=np.array([at[name] for name in KEYPOINTS]))

    def add(name: str, part: Part) -> None:
        result.parts.append(part)
        result.names.append(name)

    def add_limbs(side: str, *limbs: tuple[str, str, str]) -> None:
        for start, end, limb in limbs:
            hand = 1 if side == "left" else -1
            width = _LIMB[limb][0] * height
            part = _limb(canvas, at[f"{side}_{start}"], at[f"{side}_{end}"], width, hand, (light, dark))
            add(f"{side}_{limb}", part)

    arms = (("shoulder", "elbow", "upper_arm"), ("elbow", "wrist", "forearm"))
    behind = [side for side in ("left", "right") if random.rand() < 0.3]
    for side in behind:
        add_limbs(side, *arms)
    for side in ("left", "right"):
        add_limbs(side, ("hip", "knee", "thigh"), ("knee", "ankle", "shin"))
    viewers_left, viewers_right = ("right", "left") if facing > 0 else ("left", "right")
    corners = [f"{viewers_left}_shoulder", f"{viewers_right}_shoulder", f"{viewers_right}_hip", f"{viewers_left}_hip"]
    add("torso", _torso(canvas, np.array([at[name] for name in corners]), 0.03 * height, shirt))
    for side in ("left", "right"):
        add(f"{side}_ear", _disc(canvas, at[f"{side}_ear"], 0.028 * height, skin))
    add("head", _disc(canvas, at["head"], _HEAD * height, skin if facing > 0 else hair))
    if facing > 0:
        for name, radius, colour in (("nose", 0.016, 0.6 * skin), ("left_eye", 0.02, hair), ("right_eye", 0.02, hair)):
            add("head", _disc(canvas, at[name], radius * height, colour))
    for side in ("left", "right"):
        if side not in behind:
            add_limbs(side, *arms)
    face = ("head",) if facing > 0 else ()  # from behind, the head itself hides the face
    owners: list[tuple[str, ...]] = [face, face, face, ("left_ear", "head"), ("right_ear", "head")]
    joined = (("torso", "upper_arm"), ("upper_arm", "forearm"), ("forearm",), ("torso", "thigh"), ("thigh", "shin"),
              ("shin",))  # fmt: skip
    for parts in joined:
        owners += [tuple(p if p == "torso" else f"{side}_{p}" for p in parts) for side in ("left", "right")]
    result.owners = tuple(owners)
    return result


def _inside(joints: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(17,) bool: which joints, rounded to pixels, lie in the picture."""
    at = np.rint(joints)
    return ((at >= 0) & (at < np.array(shape[::-1]))).all(-1)


def _keypoints(person: Figure, owner: int, scene_owner: np.ndarray) -> np.ndarray:
    """(17, 3) int64 x, y, visibility: 0 outside of the picture (x = y = 0), 1 hidden, 2 visible."""
    top = np.full(scene_owner.shape, -1)
    for number, part in enumerate(person.parts):
        top[part.window][part.distance < 0] = number
    result = np.zeros((17, 3), dtype=np.int64)
    for row, inside in enumerate(_inside(person.joints, scene_owner.shape)):
        if inside:
            x, y = np.rint(person.joints[row]).astype(int)
            seen = scene_owner[y, x] == owner and person.names[top[y, x]] in person.owners[row]
            result[row] = x, y, _VISIBLE if seen else _HIDDEN
    return result


def _place_figure(canvas: Canvas, owner: int, smallest: float, largest: float) -> Figure | None:
    """Paint a figure, most of it in the picture, where it leaves the others visible; None if there is no such place."""
    height, width = canvas.shape
    for _ in range(_PLACES):
        size = canvas.random.uniform(smallest, largest) * canvas.unit
        centre = canvas.random.uniform((0.1, 0.35), (0.9, 0.75)) * (width, height)
        person = figure(canvas, centre, size)
        if _inside(person.joints, canvas.shape).sum() >= 11 and canvas.fits(canvas.mask(person.parts), _LEAST_VISIBLE):
            canvas.paint(person.parts, owner)
            return person
    return None


def draw_figures(seed: int, split: int, index: int, shape: tuple[int, int], unit: int) -> Scene:
    """A picture of one to three figures, with shapes and wires that belong to no class before and behind them.

    Every `FAR_EVERY`-th picture also holds a far figure whose keypoints are too small to be labelled.

    Args:
        seed: Of the data set, 0 to 2**32 - 1.
        split: Number of the split.
        index: Number of the picture in its split; see `is_empty` and `has_crowd`.
        shape: (height, width) in pixels.
        unit: Side in pixels that sizes refer to: figures are 0.45 to 0.9 of it high.
    """
    canvas = blank(seed, split, index, shape, unit)
    random = canvas.random
    people: list[Figure | None] = []
    crowd: list[bool] = []

    def clutter(largest: float) -> None:
        for _ in range(random.randint(0, 3)):
            centre = random.uniform(0, 1, 2) * (shape[1], shape[0])
            radius = random.uniform(0.06, largest) * unit
            thing = [shape_part(canvas, str(random.choice(SHAPES)), centre, radius)]
            if random.rand() < 0.3:
                thing = [wire_part(canvas)]
            if canvas.fits(canvas.mask(thing), _LEAST_VISIBLE):
                canvas.paint(thing, UNLABELLED)

    clutter(0.2)
    if has_crowd(index):
        centre = random.uniform(0.3, 0.7, 2) * (shape[1], shape[0])
        for _ in range(7):
            place = centre + random.normal(0, 0.12 * unit, 2)
            member = figure(canvas, place, random.uniform(0.16, 0.22) * unit)
            canvas.paint(member.parts, 1)
        people.append(None)
        crowd.append(True)
    if index % FAR_EVERY == FAR_AT and _place_figure(canvas, len(people) + 1, 0.16, 0.22):
        people.append(None)
        crowd.append(False)
    for _ in range(0 if is_empty(index) else random.choice([1, 1, 2, 2, 3])):
        person = _place_figure(canvas, len(people) + 1, 0.45, 0.9)
        if person is not None:
            people.append(person)
            crowd.append(False)
    clutter(0.12)
    nobody = np.zeros((17, 3), dtype=np.int64)
    keypoints = [
        nobody if person is None else _keypoints(person, number, canvas.owner)
        for number, person in enumerate(people, start=1)
    ]
    return Scene(canvas.finish(), canvas.owner, [PERSON] * len(people), crowd, keypoints)
