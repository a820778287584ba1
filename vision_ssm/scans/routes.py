"""Routes: the orders in which a scan visits the cells of an H x W grid. Pure geometry, no parameters.

A route family turns (H, W) into one or more `RouteTable`. Cell (row, column) has number ``row * W + column``.
Route k reads cell ``read[k, t]`` at step t and adds its output to cell ``write[k, t]``; the two differ only where a
published model puts outputs back elsewhere than it took its inputs from.
"""

import contextlib
import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes

from ..ops.registration import are_replaced
from ..registry import ROUTES, build, lookup
from .walks import Walk

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CACHED_SIZES = 64


@dataclass(frozen=True)
class RouteTable:
    """Routes that one scan walks together.

    Attributes:
        read: (K, T) int64, the cell that route k reads at step t.
        write: (K, T) int64, the cell that receives the output of that step.
        segment: the state starts anew every `segment` steps; None: one sequence of T steps.
        first: number of the first of these K routes in its family (weights are stored per route of the family).
    """

    read: torch.Tensor
    write: torch.Tensor
    segment: int | None = None
    first: int = 0

    @property
    def routes(self) -> slice:
        """The routes of the family, and so the weights, that this table belongs to."""
        return slice(self.first, self.first + self.read.shape[0])

    def to(self, device: torch.device | str) -> "RouteTable":
        """The same table on `device`."""
        return RouteTable(self.read.to(device), self.write.to(device), self.segment, self.first)


class Routes:
    """Base of the route families. A family sets `num_routes` and defines `orders`.

    Tables are made once per size and device and kept for the `_CACHED_SIZES` sizes used last.

    Attributes:
        num_routes: routes of the family.
        multiple: what the sides of its grids must be multiples of; other maps are padded with zeros at the bottom and
            right before a scan, and cropped behind it.
    """

    num_routes: int
    multiple: int = 1

    def __init__(self) -> None:
        self._cache: OrderedDict[tuple[int, int, str], list[RouteTable]] = OrderedDict()

    def orders(self, height: int, width: int, device: torch.device | str | None = None) -> torch.Tensor:
        """(K, T) int64: the cell that each route visits at each step."""
        raise NotImplementedError

    def make_tables(self, height: int, width: int, device: torch.device | str | None = None) -> list[RouteTable]:
        """Tables of this family, in the order in which they are run; uncached."""
        order = self.orders(height, width, device)
        return [RouteTable(order, order)]

    def tables(self, height: int, width: int, device: torch.device | str = "cpu") -> list[RouteTable]:
        """Cached tables for one grid size and device.

        Most families have one table. A family with several is a cascade: the scan of each table sees the output of
        the one before it.

        Raises:
            ValueError: the grid has no cell, or a side that is not a multiple of `multiple`.
        """
        if are_replaced():  # what replaces operators looks into the tables, so the graph to be made has one size
            with disable_current_modes():
                return self._remembered(int(height), int(width), device)
        if torch.compiler.is_compiling():
            if torch.compiler.is_exporting():  # an exported graph must own its tables: sizes may be symbolic
                return self.make_tables(height, width, device)
            # a compiled one finds the tables of eager calls, and with them what is planned for them; `range` makes
            # numbers of symbolic sizes, so that every size has a graph of its own
            return _constant_tables(self, len(range(height)), len(range(width)), str(device))
        return self._remembered(height, width, device)

    def _remembered(self, height: int, width: int, device: torch.device | str) -> list[RouteTable]:
        if height < 1 or width < 1:
            raise ValueError(f"a route needs a grid of at least 1 x 1 cells, got {height} x {width}")
        if height % self.multiple or width % self.multiple:
            raise ValueError(f"{self} needs sides that are multiples of {self.multiple}, got {height} x {width}")
        key = (height, width, str(device))
        found = self._cache.get(key)
        if found is None:
            # made outside of inference mode, or a later training step could not save them for backward, and of
            # transforms, which would wrap them
            with torch.inference_mode(False), temporarily_clear_interpreter_stack():
                found = [table.to(device) for table in self.make_tables(height, width)]
            if any(type(table.read) is not torch.Tensor for table in found):  # of a trace, and of no use behind it
                return found
            self._cache[key] = found
        with contextlib.suppress(KeyError):  # another thread may have dropped it, or the last one
            self._cache.move_to_end(key)
            if len(self._cache) > _CACHED_SIZES:
                self._cache.popitem(last=False)
        return found

    def multiplicity(self, height: int, width: int) -> torch.Tensor:
        """(H, W) int64: how many routes write to each cell."""
        count = torch.zeros(height * width, dtype=torch.int64)
        for table in self.tables(height, width):
            count += torch.bincount(table.write.flatten(), minlength=len(count))[: len(count)]
        return count.view(height, width)

    def walks(self, height: int, width: int) -> list[Walk]:
        """The walk of every route over a map, which is padded to the multiples of the family."""
        height, width = height + -height % self.multiple, width + -width % self.multiple
        names = self.route_names()
        return [
            Walk(names[table.first + k], height, width, table.read[k], table.segment)
            for table in self.tables(height, width)
            for k in range(len(table.read))
        ]

    def draw(self, height: int = 6, width: int = 8) -> "Figure":
        """A matplotlib figure of every route: the path over the grid, coloured from its first to its last step."""
        from .drawing import draw_walks

        self.tables(height, width)  # a map is not padded unasked
        title = f"{self.registered_name()} on {height} x {width} cells"
        return draw_walks(self.walks(height, width), title)

    def registered_name(self) -> str:
        """Name of the family in the registry, or of its class."""
        return next((name for name, cls in ROUTES.module_dict.items() if cls is type(self)), type(self).__name__)

    def route_names(self) -> list[str]:
        """What pictures call each route."""
        return [f"route {number}" for number in range(self.num_routes)]

    def __repr__(self) -> str:
        derived = ("num_routes", "multiple")
        options = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if k[0] != "_" and k not in derived)
        return f"{type(self).__name__}({options})"

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_cache": OrderedDict()}

    def __deepcopy__(self, memo: dict) -> "Routes":
        return self  # geometry never changes: copies of a model share it


def _raster(height: int, width: int, device: torch.device | str | None) -> torch.Tensor:
    return torch.arange(height * width, device=device)


def _column(height: int, width: int, device: torch.device | str | None) -> torch.Tensor:
    return torch.arange(height * width, device=device).view(height, width).t().reshape(-1)


def _snake(grid: torch.Tensor) -> torch.Tensor:
    """Lines of a (lines, cells) grid in turn from the left and from the right, (lines * cells,)."""
    turned = torch.arange(len(grid), device=grid.device)[:, None] % 2 == 1
    return torch.where(turned, grid.flip(1), grid).reshape(-1)


def _rows_and_columns(
    height: int, width: int, device: torch.device | str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of every cell, each (H*W,)."""
    cells = _raster(height, width, device)
    return cells // width, cells % width


@ROUTES.register_module(name="raster")
class Raster(Routes):
    """Row by row, each from left to right."""

    num_routes = 1

    def orders(self, height, width, device=None):
        return _raster(height, width, device)[None]


@ROUTES.register_module(name="column")
class Column(Routes):
    """Column by column, each from top to bottom."""

    num_routes = 1

    def orders(self, height, width, device=None):
        return _column(height, width, device)[None]


@ROUTES.register_module(name="reversed")
class Reversed(Routes):
    """Another family, walked from its end: the raster unless `of` names one."""

    def __init__(self, of: str | dict | list | Routes = "raster"):
        super().__init__()
        self.of = build_routes(of)
        self.num_routes, self.multiple = self.of.num_routes, self.of.multiple

    def orders(self, height, width, device=None):
        return self.of.orders(height, width, device).flip(-1)


@ROUTES.register_module(name="cross")
class Cross(Routes):
    """VMamba's four routes (SS2D, cross2d): rows, columns, and both reversed."""

    num_routes = 4

    def orders(self, height, width, device=None):
        forward = torch.stack([_raster(height, width, device), _column(height, width, device)])
        return torch.cat([forward, forward.flip(-1)])  # (4, H*W)


@ROUTES.register_module(name="snake")
class Snake(Routes):
    """Rows, then columns, walked to and fro so that every step goes to a neighbour, each also in reverse.

    The order of PlainMamba's continuous scan (arXiv 2403.17695): rows, rows reversed, columns, columns reversed.
    """

    num_routes = 4

    def orders(self, height, width, device=None):
        grid = _raster(height, width, device).view(height, width)
        paths = []
        for lines in (grid, grid.t()):
            backwards = torch.arange(lines.shape[0], device=device) % 2 == 1
            path = torch.where(backwards[:, None], lines.flip(-1), lines).reshape(-1)  # (H*W,)
            paths += [path, path.flip(-1)]
        return torch.stack(paths)  # (4, H*W)


@ROUTES.register_module(name="bidirectional")
class Bidirectional(Routes):
    """The raster `repeats` times, then its reverse `repeats` times, each with weights of its own."""

    def __init__(self, repeats: int = 2):
        super().__init__()
        self.repeats = _positive("repeats", repeats)
        self.num_routes = 2 * repeats

    def orders(self, height, width, device=None):
        forward = _raster(height, width, device).expand(self.repeats, -1)
        return torch.cat([forward, forward.flip(-1)])  # (2 * repeats, H*W)


@ROUTES.register_module(name="unidirectional")
class Unidirectional(Routes):
    """The raster `repeats` times, each with weights of its own."""

    def __init__(self, repeats: int = 4):
        super().__init__()
        self.num_routes = self.repeats = _positive("repeats", repeats)

    def orders(self, height, width, device=None):
        return _raster(height, width, device).repeat(self.repeats, 1)


@ROUTES.register_module(name="rotations")
class Rotations(Routes):
    """The raster of the map turned by 0, 90, 180 and 270 degrees counter-clockwise."""

    num_routes = 4

    def orders(self, height, width, device=None):
        grid = _raster(height, width, device).view(height, width)
        return torch.stack([torch.rot90(grid, turns).reshape(-1) for turns in range(4)])  # (4, H*W)


class _Pair(Routes):
    """Two walks over the grid, each followed by its reverse."""

    num_routes = 4

    def pair(self, height: int, width: int, device: torch.device | str | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Two orders of all cells, each (H*W,)."""
        raise NotImplementedError

    def orders(self, height, width, device=None):
        first, second = self.pair(height, width, device)
        return torch.stack([first, first.flip(0), second, second.flip(0)])  # (4, H*W)


@ROUTES.register_module(name="raster_pair")
class RasterPair(_Pair):
    """Rows, rows reversed, columns, columns reversed: `cross` with each route before its reverse (MHS-VM's Z)."""

    def pair(self, height, width, device):
        return _raster(height, width, device), _column(height, width, device)


@ROUTES.register_module(name="snake_pair")
class SnakePair(_Pair):
    """Rows there and back in turn, then columns so, each with its reverse (MHS-VM's C)."""

    def pair(self, height, width, device):
        grid = _raster(height, width, device).view(height, width)
        return _snake(grid), _snake(grid.t())


@ROUTES.register_module(name="diagonal_pair")
class DiagonalPair(_Pair):
    """Anti-diagonals there and back in turn, from the top left and from the top right, each reversed (MHS-VM's X)."""

    def pair(self, height, width, device):
        row, column = _rows_and_columns(height, width, device)
        diagonal = row + column
        inside = torch.where(diagonal % 2 == 1, row, height - 1 - row)  # odd ones go down, even ones up
        first = torch.argsort(diagonal * height + inside)
        return first, first // width * width + (width - 1 - first % width)


@ROUTES.register_module(name="spiral_pair")
class SpiralPair(_Pair):
    """Clockwise rings from the top left inwards, and their mirror image from below, each reversed (MHS-VM's S)."""

    def pair(self, height, width, device):
        row, column = _rows_and_columns(height, width, device)
        ring = torch.minimum(torch.minimum(row, height - 1 - row), torch.minimum(column, width - 1 - column))
        row, column, down, right = row - ring, column - ring, height - 1 - 2 * ring, width - 1 - 2 * ring
        before = height * width - (down + 1) * (right + 1)  # cells of the rings outside of this one
        # steps along the sides of the ring: top, right, bottom, left
        step = torch.where(row == down, 2 * right + down - column, 2 * right + 2 * down - row)
        step = torch.where(column == right, right + row, step)
        step = torch.where(row == 0, column, step)
        first = torch.argsort(before + step)
        return first, (height - 1 - first // width) * width + first % width


@ROUTES.register_module(name="cascade")
class Cascade(Routes):
    """VMamba's cascade2d: every row on its own, both ways, then every column of the result, both ways.

    A reversed line is read from its end but its outputs are written from the start of the line, as the original does
    (it adds the two directions without turning the second one back).
    """

    num_routes = 4

    def orders(self, height, width, device=None):
        rows = _raster(height, width, device).view(height, width)
        columns = rows.t()
        lines = (rows, rows.flip(-1), columns, columns.flip(-1))
        return torch.stack([line.reshape(-1) for line in lines])  # (4, H*W)

    def make_tables(self, height, width, device=None):
        order = self.orders(height, width, device)
        return [
            RouteTable(order[:2], order[:1].expand(2, -1).contiguous(), segment=width, first=0),
            RouteTable(order[2:], order[2:3].expand(2, -1).contiguous(), segment=height, first=2),
        ]


@ROUTES.register_module(name="atrous")
class Atrous(Routes):
    """EfficientVMamba's four routes, each over every second row and column, so that one route visits a cell.

    Two walk the even rows, row by row, in the even and in the odd columns (routes 0 and 2); two walk the odd rows,
    column by column, in the even and in the odd columns (routes 1 and 3). There is no reversed route.
    """

    num_routes = 4
    multiple = 2

    def orders(self, height, width, device=None):
        grid = _raster(height, width, device).view(height, width)
        even, odd = grid[0::2], grid[1::2].t()
        quarters = (even[:, 0::2], odd[0::2], even[:, 1::2], odd[1::2])
        return torch.stack([quarter.reshape(-1) for quarter in quarters])  # (4, H/2 * W/2)


@ROUTES.register_module(name="compose")
class Compose(Routes):
    """Several families side by side, as if they were one; a list of names builds this."""

    def __init__(self, families: list[str | dict | list | Routes]):
        super().__init__()
        if not families:
            raise ValueError("compose needs at least one route family")
        self.families = [build_routes(family) for family in families]
        self.num_routes = sum(family.num_routes for family in self.families)
        self.multiple = math.lcm(*(family.multiple for family in self.families))

    def orders(self, height, width, device=None):
        orders = [family.orders(height, width, device) for family in self.families]
        lengths = [order.shape[1] for order in orders]  # no set: they may be those of a trace
        if any(length != lengths[0] for length in lengths):
            raise ValueError(f"routes of different lengths cannot run in one scan: {self} has {lengths} steps")
        return torch.cat(orders)  # (sum of K, T)

    def route_names(self):
        return [f"{family.registered_name()} {k}" for family in self.families for k in range(family.num_routes)]

    def make_tables(self, height, width, device=None):
        made = [family.make_tables(height, width, device) for family in self.families]
        if any(len(tables) > 1 or tables[0].segment is not None for tables in made):
            raise ValueError(f"a cascade cannot run beside other routes: {self}")
        self.orders(height, width, device)  # checks the lengths
        return [RouteTable(torch.cat([t[0].read for t in made]), torch.cat([t[0].write for t in made]))]


@torch._dynamo.assume_constant_result
def _constant_tables(routes: Routes, height: int, width: int, device: str) -> list[RouteTable]:
    return routes._remembered(height, width, device)


def _positive(name: str, value: int) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive whole number, got {value!r}")
    return value


def build_routes(spec: "str | dict | list | Routes") -> Routes:
    """A route family from its name, from ``dict(type=name, ...)``, or from a list of these (side by side)."""
    if isinstance(spec, Routes):
        return spec
    if isinstance(spec, (list, tuple)):
        return Compose(list(spec))
    return build(ROUTES, spec)


def list_routes() -> list[str]:
    """Names of all route families."""
    return sorted(ROUTES.module_dict)


def describe_routes(name: str) -> str:
    """First line of a family's documentation."""
    return (lookup(ROUTES, name).__doc__ or "").strip().splitlines()[0]
