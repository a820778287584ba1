"""State-space models for vision: every published scan, every published backbone, one library."""

from pathlib import Path

_HERE = Path(__file__).resolve().parent
# In a source tree the kernels lie beside the package, in an installed one inside it.
if not (_HERE / "kernels").is_dir() and (_HERE.parent / "kernels" / "__init__.py").is_file():
    __path__.append(str(_HERE.parent))

from .factory import create_model, import_official, list_models, list_unets  # noqa: E402
from .integrations import timm_registry as _timm_registry  # noqa: E402
from .scans import build_routes, build_scan, list_routes, list_scans  # noqa: E402
from .unets import load_encoder  # noqa: E402
from .version import __version__  # noqa: E402
from .weights import CheckpointError, LoadReport, load_weights  # noqa: E402

_timm_registry.register()

__all__ = [
    "CheckpointError",
    "LoadReport",
    "__version__",
    "build_routes",
    "build_scan",
    "create_model",
    "import_official",
    "list_models",
    "list_routes",
    "list_scans",
    "list_unets",
    "load_encoder",
    "load_weights",
]
