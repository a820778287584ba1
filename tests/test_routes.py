"""Route families: geometry against written-out tables, and what every family must satisfy."""

import copy
import pickle
import random
import sys
import threading

import golden_cases
import pytest
import torch

import vision_ssm
from vision_ssm.ops import scan_2d
from vision_ssm.scans import build_routes, build_scan, describe_routes, list_routes

SIZES = [(1, 1), (1, 5), (4, 1), (2, 3), (5, 7), (8, 8)]
# options for families that need some; every other family is built by name
SPECS = {"compose": dict(type="compose", families=["raster", dict(type="reversed", of="column")])}
# cells of a 2 x 3 grid, numbered 0 1 2 / 3 4 5, in the order in which each route reads them; of the smallest grid that
# holds it where a family wants sides that are multiples of something
READS = {
    "raster": [[0, 1, 2, 3, 4, 5]],
    "column": [[0, 3, 1, 4, 2, 5]],
    "reversed": [[5, 4, 3, 2, 1, 0]],
    "cross": [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0]],
    "snake": [[0, 1, 2, 5, 4, 3], [3, 4, 5, 2, 1, 0], [0, 3, 4, 1, 2, 5], [5, 2, 1, 4, 3, 0]],
    "bidirectional": [[0, 1, 2, 3, 4, 5]] * 2 + [[5, 4, 3, 2, 1, 0]] * 2,
    "unidirectional": [[0, 1, 2, 3, 4, 5]] * 4,
    "rotations": [[0, 1, 2, 3, 4, 5], [2, 5, 1, 4, 0, 3], [5, 4, 3, 2, 1, 0], [3, 0, 4, 1, 5, 2]],
    "raster_pair": [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [0, 3, 1, 4, 2, 5], [5, 2, 4, 1, 3, 0]],
    "snake_pair": [[0, 1, 2, 5, 4, 3], [3, 4, 5, 2, 1, 0], [0, 3, 4, 1, 2, 5], [5, 2, 1, 4, 3, 0]],
    "diagonal_pair": [[0, 1, 3, 4, 2, 5], [5, 2, 4, 3, 1, 0], [2, 1, 5, 4, 0, 3], [3, 0, 4, 5, 1, 2]],
    "spiral_pair": [[0, 1, 2, 5, 4, 3], [3, 4, 5, 2, 1, 0], [3, 4, 5, 2, 1, 0], [0, 1, 2, 5, 4, 3]],
    "cascade": [[0, 1, 2, 3, 4, 5], [2, 1, 0, 5, 4, 3], [0, 3, 1, 4, 2, 5], [3, 0, 4, 1, 5, 2]],
    "atrous": [[0, 2], [4, 6], [1, 3], [5, 7]],  # 0 1 2 3 / 4 5 6 7
    "compose": [[0, 1, 2, 3, 4, 5], [5, 2, 4, 1, 3, 0]],
}


def routes_of(name):
    return build_routes(SPECS.get(name, name))


def padded(routes, height, width):
    """The smallest grid for these routes that holds height x width cells."""
    return height + -height % routes.multiple, width + -width % routes.multiple


def test_tables_first_asked_for_inside_of_a_transform():
    """They outlive it: copied, pickled, and used by kernels, which read their memory."""
    mixer = build_scan("multi_direction", 8)
    torch.func.vmap(torch.func.grad(lambda x: mixer(x).sum()))(torch.randn(2, 1, 3, 4, 8))
    table = mixer.core.routes.tables(3, 4)[0]
    assert table.read.data_ptr() and torch.equal(copy.deepcopy(table.read), build_routes("cross").tables(3, 4)[0].read)


def test_threads_share_a_family():
    """More sizes than are kept, from several threads at once."""
    routes, failed = build_routes("cross"), []

    def ask(seed: int) -> None:
        sizes = random.Random(seed)
        try:
            for _ in range(300):
                height, width = sizes.randint(1, 12), sizes.randint(1, 12)
                assert routes.tables(height, width)[0].read.shape == (4, height * width)
        except Exception as error:
            failed.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failed


def test_registry_lists_every_expected_table():
    assert set(vision_ssm.list_routes()) == set(READS)
    assert all(describe_routes(name).endswith(".") for name in READS)


@pytest.mark.parametrize("name", list_routes())
def test_reads_on_2x3(name):
    routes = routes_of(name)
    reads = torch.cat([table.read for table in routes.tables(*padded(routes, 2, 3))])
    assert reads.tolist() == READS[name]
    assert routes.num_routes == len(READS[name])


@pytest.mark.parametrize("name", list_routes())
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_covers_every_cell(name, size):
    """A route covers all cells once, or all routes of a family together cover them equally often."""
    routes = routes_of(name)
    size = padded(routes, *size)
    first, cells, visits = 0, size[0] * size[1], 0
    for table in routes.tables(*size):
        assert table.read.shape == table.write.shape and table.read.dtype == table.write.dtype == torch.int64
        for visited in (table.read, table.write):
            assert all(len(route.unique()) == visited.shape[1] for route in visited)
            assert visited.min() == 0 and visited.max() == cells - 1
        assert table.routes == slice(first, first + len(table.read))
        first = table.routes.stop
        visits += table.write.numel() // cells
        assert table.segment is None or cells % table.segment == 0
    assert first == routes.num_routes
    assert torch.equal(routes.multiplicity(*size), torch.full(size, visits))


@pytest.mark.parametrize("name", [name for name in list_routes() if name != "cascade"])
def test_merging_a_scan_that_only_copies_gives_the_multiple(name):
    routes, dim = routes_of(name), 4
    height, width = padded(routes, 3, 5)
    (table,) = routes.tables(height, width)
    count = routes.num_routes
    x = torch.randn(2, height * width, dim)
    nothing = torch.zeros(2, height * width, count, 1)
    merged = scan_2d(
        x, torch.zeros(2, height * width, count, dim), -torch.ones(count, dim, 1), nothing, nothing,
        torch.ones(count, dim), read=table.read, write=table.write, segment=table.segment,
    )  # fmt: skip
    torch.testing.assert_close(merged, routes.multiplicity(height, width).view(-1, 1) * x)


MODES = {"cross2d": "cross", "unidi": "unidirectional", "bidi": "bidirectional", "rotations": "rotations"}


@pytest.mark.parametrize(
    "case", golden_cases.load("ops/cross_scan")["cases"], ids=lambda c: f"{c['mode']}-{c['H']}x{c['W']}"
)
def test_golden_cross_scan(case):
    (table,) = build_routes(MODES[case["mode"]]).tables(case["H"], case["W"])
    x, ys = torch.tensor(case["x"]), torch.tensor(case["ys"])
    assert x[table.read].tolist() == case["routes"]
    merged = torch.zeros_like(x).index_add(0, table.write.flatten(), ys.flatten())
    assert merged.tolist() == case["merged"]
    per_route = torch.tensor(case["x_per_route"])
    assert per_route.gather(1, table.read).tolist() == case["routes_per_route"]
    assert torch.zeros_like(ys).scatter(1, table.write, ys).tolist() == case["merged_per_route"]


def test_tables_are_cached_per_size_and_bounded():
    routes = build_routes("cross")
    assert routes.tables(4, 6) is routes.tables(4, 6)
    assert routes.tables(6, 4) is not routes.tables(4, 6)
    for width in range(1, 200):
        routes.tables(1, width)
    assert len(routes._cache) == 64


def test_tables_made_under_inference_mode_serve_training():
    routes = build_routes("cross")
    with torch.inference_mode():
        routes.tables(3, 3)
    x = torch.randn(9, 2, requires_grad=True)
    x.index_select(0, routes.tables(3, 3)[0].read[1]).sum().backward()
    assert x.grad.eq(1).all()


def test_copies_and_pickles():
    routes = build_routes([dict(type="bidirectional", repeats=1), "column"])
    routes.tables(2, 2)
    for other in (copy.deepcopy(routes), pickle.loads(pickle.dumps(routes))):
        assert other.num_routes == 3
        assert torch.equal(other.tables(2, 2)[0].read, routes.tables(2, 2)[0].read)


@pytest.mark.parametrize("name", list_routes())
def test_draws_itself(name, tmp_path):
    routes = routes_of(name)
    figure = routes.draw(*padded(routes, 4, 5))
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == routes.route_names() and len(set(titles)) == routes.num_routes
    first_step = [round(float(v)) for v in figure.axes[0].collections[0].get_segments()[0].flatten()]
    assert first_step == {"atrous": [0, 0, 2, 0]}.get(name, [0, 0, 1, 0]) or name in ("column", "reversed")
    figure.savefig(tmp_path / "routes.png")
    assert (tmp_path / "routes.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "spec,error,message",
    [
        ("crss", KeyError, "unknown route 'crss'. Did you mean 'cross'"),
        (dict(type="bidirectional", repeat=2), TypeError, "unknown keyword 'repeat'. 'repeat': Did you mean 'repeats'"),
        (dict(type="bidirectional", repeats=0), ValueError, "repeats must be a positive whole number, got 0"),
        ([], ValueError, "compose needs at least one"),
        (3, TypeError, "given by name or as dict"),
    ],
)
def test_wrong_specifications(spec, error, message):
    with pytest.raises(error, match=message.replace("(", r"\(").replace(".", r"\.")):
        build_routes(spec)


def test_wrong_grids():
    with pytest.raises(ValueError, match="at least 1 x 1 cells, got 0 x 3"):
        build_routes("raster").tables(0, 3)
    with pytest.raises(ValueError, match="cascade cannot run beside other routes"):
        build_routes(["raster", "cascade"]).tables(2, 2)
    with pytest.raises(ValueError, match=r"Atrous\(\)\) needs sides that are multiples of 2, got 4 x 3"):
        build_routes(dict(type="reversed", of="atrous")).tables(4, 3)


def test_tables_of_a_trace_are_not_kept():
    from torch._subclasses.fake_tensor import FakeTensorMode

    mixer = build_scan("multi_direction", 8)
    x = torch.randn(1, 4, 5, 8)
    with FakeTensorMode(allow_non_fake_inputs=True):
        mixer(torch.randn(1, 4, 5, 8))
    assert mixer(x).shape == x.shape
    assert copy.deepcopy(mixer)(x).shape == x.shape
