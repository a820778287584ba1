"""Looking at models from outside: how fast they are, and tables of what there is."""

from .benchmark import BenchmarkError, Measurement, benchmark_models, describe_machine
from .tables import fill_tables

__all__ = ["BenchmarkError", "Measurement", "benchmark_models", "describe_machine", "fill_tables"]
