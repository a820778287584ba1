"""Looking at models from outside: how fast they and their operators are, and tables of what there is."""

from .benchmark import Measurement, ModelSettings, benchmark_models
from .benchmark_ops import CASES, OperatorMeasurement, OperatorSettings, benchmark_operator, find_cases
from .macs import Count, count_macs, count_operations
from .sweep import Point, sweep_models, sweep_operators
from .tables import fill_tables
from .timing import BenchmarkError, Timing, copy_bandwidth, describe_machine

__all__ = [
    "CASES",
    "BenchmarkError",
    "Count",
    "Measurement",
    "ModelSettings",
    "OperatorMeasurement",
    "OperatorSettings",
    "Point",
    "Timing",
    "benchmark_models",
    "benchmark_operator",
    "copy_bandwidth",
    "count_macs",
    "count_operations",
    "describe_machine",
    "fill_tables",
    "find_cases",
    "sweep_models",
    "sweep_operators",
]
