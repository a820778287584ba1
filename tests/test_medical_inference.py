"""Labels of whole volumes: resizing as the papers do, sliding windows, flips, precision, memory; largest components."""

import builtins

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, zoom
from torch import Tensor, nn

from vision_ssm.engine import keep_largest, predict_volume
from vision_ssm.engine.medical_inference import resize_slice

CLASSES = 4


class Net(nn.Module):
    """Convolution of any kernel, which keeps the size; remembers the shapes and dtype it has seen."""

    def __init__(self, kernel: int = 1, classes: int = CLASSES, channels: int = 1, symmetric: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, classes, kernel, padding=kernel // 2)
        self.dropout = nn.Dropout(0.5)
        self.shapes: list[tuple[int, ...]] = []
        self.dtype: torch.dtype | None = None
        if symmetric:
            weight = self.conv.weight.data
            self.conv.weight.data = (weight + weight.flip(2) + weight.flip(3) + weight.flip(2, 3)) / 4

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        self.shapes.append(tuple(x.shape))
        scores = 3 * self.dropout(self.conv(x))
        self.dtype = scores.dtype
        return (scores, scores[..., ::2, ::2]) if self.training else scores


def volume(depth=5, channels=1, height=40, width=36, seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    smooth = gaussian_filter(rng.normal(size=(depth, channels, height, width)), (0, 0, 2, 2))
    return (6 * smooth).astype(np.float32)


def paper_loop(model: nn.Module, image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Evaluation of a volume as VM-UNet's code has it."""
    model.eval()
    labels = np.zeros((len(image), *image.shape[2:]))
    for number, channels in enumerate(image):
        height, width = channels.shape[1:]
        small = np.stack([zoom(part, (size[0] / height, size[1] / width), order=3) for part in channels])
        with torch.no_grad():
            scores = model(torch.from_numpy(small)[None].float())[0]
        found = (scores[0].sigmoid() >= 0.5).int() if len(scores) == 1 else scores.softmax(0).argmax(0)
        labels[number] = zoom(found.numpy(), (height / size[0], width / size[1]), order=0)
    return labels


@pytest.mark.parametrize("classes", [1, CLASSES])
@pytest.mark.parametrize("shape, size", [((40, 36), (24, 20)), ((21, 33), (32, 32)), ((30, 30), (30, 30)), ((57, 31), (17, 64))])
def test_slices_are_resized_as_in_the_papers(classes, shape, size):
    model, image = Net(3, classes, channels=2), volume(3, 2, *shape)
    labels = predict_volume(model, image, size=size, batch=2)
    assert labels.dtype == np.uint8 and labels.shape == (3, *shape)
    np.testing.assert_array_equal(labels, paper_loop(model, image, size))
    assert len(np.unique(labels)) >= min(classes + 1, 3)
    assert {part[2:] for part in model.shapes} == {size}


@pytest.mark.parametrize("order", [0, 3])
def test_resizing_equals_zoom_but_for_its_empty_border(order):
    """At 115 to 224 rounding puts the last coordinate outside of the image, where zoom by itself gives 0."""
    rng = np.random.default_rng(0)
    image = rng.random((115, 115), dtype=np.float32) + 1
    theirs, ours = zoom(image, 224 / 115, order=order), resize_slice(image, (224, 224), order)
    assert not theirs[-1].any() and ours[-1].min() > 0.3
    np.testing.assert_array_equal(ours[:-1, :-1], theirs[:-1, :-1])
    np.testing.assert_allclose(ours[-1, [0, -1]], image[-1, [0, -1]], rtol=1e-5)  # corners meet corners
    stack = rng.random((2, 3, 20, 30), dtype=np.float32)
    expected = np.stack([[zoom(part, (31 / 20, 17 / 30), order=order) for part in row] for row in stack])
    np.testing.assert_array_equal(resize_slice(stack, (31, 17), order), expected)


@pytest.mark.parametrize("classes", [1, CLASSES])
@pytest.mark.parametrize("shape, window, overlap", [
    ((40, 36), (16, 16), 0.5),
    ((40, 36), 16, 0.0),
    ((40, 36), (17, 23), 0.75),
    ((40, 36), (16, 64), 0.25),  # wider than the slice
    ((9, 7), 32, 0.5),  # the slice fits into one window
    ((40, 36), (40, 36), 0.99),
    ((5, 1), (2, 1), 0.9),
])  # fmt: skip
def test_windows_of_a_pointwise_net_give_the_whole_image(classes, shape, window, overlap):
    pytest.importorskip("monai")
    model, image = Net(1, classes), volume(2, 1, *shape)
    whole = predict_volume(model, image, size=None)
    labels = predict_volume(model, image, window=window, overlap=overlap, batch=3)
    np.testing.assert_array_equal(labels, whole)
    sides = (window, window) if isinstance(window, int) else window
    assert model.shapes[-1][2:] == sides
    assert max(part[0] for part in model.shapes[1:]) <= 3


def test_windows_are_blended_by_a_gaussian():
    """Two windows of 4 columns over 6; each answers with class 1 in its own last column, surely, else undecided."""
    pytest.importorskip("monai")

    def model(x: Tensor) -> Tensor:
        scores = torch.zeros(len(x), 2, *x.shape[2:])
        scores[:, 0] = 0.4
        scores[:, 1, :, -1] = 3.0
        return scores

    labels = predict_volume(model, np.zeros((1, 1, 4, 6), dtype=np.float32), window=4, overlap=0.5)
    weight = np.exp(-np.array([1.5, 0.5, 0.5, 1.5]) ** 2 / (2 * (0.125 * 4) ** 2))
    weight = np.maximum(weight, 1e-3)
    low, high = 1 / (1 + np.exp(0.4)), 1 / (1 + np.exp(0.4 - 3.0))
    # column 3 is the last one of the first window and the second one of the other
    at_seam = (weight[3] * high + weight[1] * low) / (weight[3] + weight[1])
    assert at_seam < 0.5 < (high + low) / 2  # equal weights would decide otherwise
    assert labels[0].tolist() == [[0, 0, 0, 0, 0, 1]] * 4


FLIPS = ("horizontal", "vertical", "both")


@pytest.mark.parametrize("window", [None, 16])
def test_flips_of_an_equivariant_net_change_nothing(window):
    if window is not None:
        pytest.importorskip("monai")
    model, image = Net(3, symmetric=True), volume()
    plain = predict_volume(model, image, size=None, window=window)
    np.testing.assert_array_equal(predict_volume(model, image, size=None, window=window, flips=FLIPS), plain)


@pytest.mark.parametrize("flips", [(), ("horizontal",), ("vertical", "both"), FLIPS])
def test_flips_average_probabilities(flips):
    model, image = Net(5), volume()
    labels = predict_volume(model, image, size=None, flips=flips)
    inputs = torch.from_numpy(image)
    axes = [()] + [dict(horizontal=(3,), vertical=(2,), both=(2, 3))[flip] for flip in flips]
    with torch.no_grad():
        every = [model.eval()(inputs.flip(axis)).softmax(1).flip(axis) for axis in axes]
    expected = torch.stack(every).mean(0).argmax(1).numpy()
    np.testing.assert_array_equal(labels, expected)
    if flips:
        assert (labels != predict_volume(model, image, size=None)).any()


@pytest.mark.parametrize("keywords", [dict(size=None), dict(size=16), dict(window=16)])
def test_batch_depth_and_single_slices_do_not_matter(keywords):
    if "window" in keywords:
        pytest.importorskip("monai")
    model, image = Net(3), volume(7)
    expected = predict_volume(model, image, **keywords)
    for batch in (1, 3, 64):
        np.testing.assert_array_equal(predict_volume(model, image, batch=batch, **keywords), expected)
    for number in range(len(image)):
        single = predict_volume(model, image[number : number + 1], **keywords)
        np.testing.assert_array_equal(single[0], expected[number])


def test_few_slices_are_predicted_at_a_time():
    model, image = Net(), volume(11)
    predict_volume(model, image, size=None, batch=4)
    assert [part[0] for part in model.shapes] == [4, 4, 3]


@pytest.mark.parametrize("shape, batches", [
    ((8, 1, 16, 24), [8] * 2),  # two windows a slice
    ((8, 1, 32, 32), [8] * 9),  # nine, in batches across slices
    ((1, 1, 80, 88), [8] * 11 + [2]),  # 9 x 10: a slice at a time
    ((2, 1, 80, 88), [8] * 11 + [2] + [8] * 11 + [2]),
])  # fmt: skip
def test_windows_of_several_slices_fill_a_batch(shape, batches):
    pytest.importorskip("monai")
    model = Net()
    predict_volume(model, volume(*shape), window=16, batch=8)
    assert [part[0] for part in model.shapes] == batches


def test_modes_of_training_return():
    model = Net()
    model.train()
    model.conv.eval()
    image = volume(2)
    first, second = (predict_volume(model, image, size=None) for _ in range(2))  # no dropout, no auxiliary scores
    np.testing.assert_array_equal(first, second)
    assert model.training and model.dropout.training and not model.conv.training
    image[1, 0, 3, 3] = 1
    with pytest.raises(ValueError, match="the model gives"):
        predict_volume(nn.Sequential(model, nn.Flatten()), image, size=None)
    assert model.training and not model.conv.training


def test_first_entry_of_a_tuple_counts():
    inner, image = Net().eval(), volume(2)
    labels = predict_volume(lambda x: (inner(x), inner(x)[..., ::2, ::2]), image, size=None)
    np.testing.assert_array_equal(labels, predict_volume(inner, image, size=None))


def test_precision():
    model, image = Net(3), volume()
    exact = predict_volume(model, image, size=None)
    assert model.dtype == torch.float32
    half = predict_volume(model, image, size=None, amp="bf16")
    assert model.dtype == torch.bfloat16
    assert 0.97 < (half == exact).mean()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # what is asked for here counts, not what is around
        np.testing.assert_array_equal(predict_volume(model, image, size=None, amp="fp32"), exact)
    assert model.dtype == torch.float32


def test_device_and_other_floats():
    model, image = Net(), volume()
    expected = predict_volume(model, image)
    np.testing.assert_array_equal(predict_volume(model, image.astype(np.float64), device="cpu"), expected)
    assert expected.shape == (5, 40, 36)


@pytest.mark.gpu
def test_gpu_gives_the_labels_of_the_cpu():
    pytest.importorskip("monai")
    model, image = Net(3), volume()
    expected = predict_volume(model, image, size=None)
    labels = predict_volume(model, image, size=None, device="cuda", window=16)
    assert next(model.parameters()).is_cuda and (labels == expected).mean() > 0.9
    assert (predict_volume(model, image, size=None) == expected).mean() > 0.999


def wrong(x: Tensor) -> Tensor:
    return torch.zeros(len(x), 2, 5, 5)


def many(x: Tensor) -> Tensor:
    return torch.zeros(len(x), 257, *x.shape[2:])


BAD_CALLS = [
    (dict(overlap=1.0), "overlap is the share.*got 1.0"),
    (dict(overlap=-0.1), "from 0 to below 1; got -0.1"),
    (dict(window=0), "window is a positive height and width.*got 0"),
    (dict(window=(16, 16, 16)), r"window is a positive height and width.*got \(16, 16, 16\)"),
    (dict(size=(224.0, 224)), "size is a positive height and width"),
    (dict(size=(-1, 5)), "size is a positive height and width"),
    (dict(batch=0), "at least 1; got 0"),
    (dict(flips=("horizontl",)), "unknown flip 'horizontl'. Did you mean 'horizontal'"),
    (dict(amp="bf61"), "unknown precision 'bf61'. Did you mean 'bf16'"),
    (dict(image=np.zeros((5, 8, 8), dtype=np.float32)), r"image is float \(D, C, H, W\), got float32 \(5, 8, 8\)"),
    (dict(image=np.zeros((1, 1, 8, 8), dtype=np.uint8)), "got uint8"),
    (dict(image=np.zeros((0, 1, 8, 8), dtype=np.float32)), r"got float32 \(0, 1, 8, 8\)"),
    (dict(image=np.stack([np.zeros((1, 8, 8)), np.full((1, 8, 8), np.nan)])), "slice 1 of the image has values that are not finite"),
    (dict(model=wrong), r"the model gives \(5, 2, 5, 5\) for an input of \(5, 1, 224, 224\)"),
    (dict(model=many), "at most 256 classes"),
]  # fmt: skip


@pytest.mark.parametrize("keywords, message", BAD_CALLS)
def test_bad_calls(keywords, message):
    given = dict(keywords)
    with pytest.raises(ValueError, match=message):
        predict_volume(given.pop("model", Net()), given.pop("image", volume()), **given)


def test_without_monai_the_extra_is_named(monkeypatch):
    original = builtins.__import__

    def refuse(name, *args, **keywords):
        if name.startswith("monai"):
            raise ImportError(name)
        return original(name, *args, **keywords)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install vision_ssm\[medical\]"):
        predict_volume(Net(), volume(), window=16)


def test_keep_largest_by_hand():
    labels = np.array([
        [1, 1, 0, 2, 0, 3],
        [0, 0, 1, 0, 0, 0],
        [2, 0, 0, 0, 1, 3],
        [2, 2, 0, 0, 0, 3],
    ], dtype=np.int16)  # fmt: skip
    before = labels.copy()
    expected = labels.copy()
    expected[0, 3] = expected[2, 4] = expected[0, 5] = 0  # corners connect: class 1 keeps three
    cleaned = keep_largest(labels)
    assert cleaned.dtype == np.int16
    np.testing.assert_array_equal(cleaned, expected)
    np.testing.assert_array_equal(labels, before)
    only = labels.copy()
    only[0, 3] = 0
    np.testing.assert_array_equal(keep_largest(labels, classes=(2, 9)), only)
    np.testing.assert_array_equal(keep_largest(cleaned), cleaned)
    np.testing.assert_array_equal(keep_largest(np.zeros((2, 3, 3), dtype=np.uint8)), np.zeros((2, 3, 3)))


def test_keep_largest_connects_slices():
    labels = np.zeros((3, 5, 5), dtype=np.uint8)
    labels[0, 0, 0] = labels[1, 1, 1] = labels[2, 2, 2] = 1  # one component across slices
    labels[0, 3:, 4] = 1
    cleaned = keep_largest(labels)
    assert cleaned.sum() == 3 and not cleaned[0, 3:, 4].any()


def test_keep_largest_equals_monai():
    transforms = pytest.importorskip("monai.transforms")
    pytest.importorskip("skimage")
    rng = np.random.default_rng(0)
    labels = np.argmax([gaussian_filter(rng.normal(size=(8, 20, 22)), 1.2) for _ in range(4)], 0)
    specks = rng.random(labels.shape) < 0.02
    labels[specks] = rng.integers(0, 4, int(specks.sum()))
    expected = transforms.KeepLargestConnectedComponent()(torch.from_numpy(labels.copy())[None])[0].numpy()
    ours = keep_largest(labels)
    assert 0 < (ours != labels).sum()
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("labels, classes, message", [
    (np.zeros((2, 2), dtype=np.float32), None, "labels are integers from 0 on, got float32"),
    (np.full((2, 2), -1), None, "labels are integers from 0 on"),
    (np.zeros((2, 2), dtype=int), (0, 1), "from 1 on, 0 is the background; got 0"),
])  # fmt: skip
def test_bad_labels(labels, classes, message):
    with pytest.raises(ValueError, match=message):
        keep_largest(labels, classes)
