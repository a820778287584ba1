"""EfficientVMamba's ES2D: selective scan along four routes that share the cells of the map between them.

Paper: EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba, arXiv 2403.09977. Source of the
mathematics: github.com/TerryPei/EfficientVMamba, classification/models/vmamba_efficient.py.
"""

from ..registry import SCANS
from .multi_direction import MultiDirectionScan


@SCANS.register_module(name=["atrous", "AtrousScan"])
class AtrousScan(MultiDirectionScan):
    """Four selective scans, each over every second row and column (EfficientVMamba's ES2D), each cell in one of them.

    A quarter of the steps of `MultiDirectionScan`, whose mixer this is, along the routes ``"atrous"``. Maps with odd
    sides are padded with zeros behind the convolution: the state decays there and takes nothing in.

    Args:
        dim: width C of input and output.
        expand, state_dim, dt_rank, core, conv_kernel, conv_bias, act, gate, dropout, init: see `MultiDirectionScan`.
    """

    def __init__(
        self,
        dim: int,
        *,
        expand: float = 2.0,
        state_dim: int = 16,
        dt_rank: int | str = "auto",
        core: str = "s6",
        conv_kernel: int = 3,
        conv_bias: bool = True,
        act: str = "silu",
        gate: bool = True,
        dropout: float = 0.0,
        init: str | None = None,
    ):
        super().__init__(
            dim,
            expand=expand,
            state_dim=state_dim,
            dt_rank=dt_rank,
            routes="atrous",
            core=core,
            conv_kernel=conv_kernel,
            conv_bias=conv_bias,
            act=act,
            gate=gate,
            dropout=dropout,
            init=init,
        )
