"""Which distributions of OpenMMLab's packages are installed: at most one per package."""

from importlib import metadata

_OWNERS = {
    "mmengine": ("onedl-mmengine", "mmengine"),
    "mmcv": ("onedl-mmcv", "mmcv", "mmcv-lite", "mmcv-full"),
    "mmseg": ("onedl-mmsegmentation", "mmsegmentation"),
    "mmdet": ("onedl-mmdetection", "mmdet", "mmdetection"),
}
"""Distributions that install the same folder; pip lets one overwrite the other's files."""


class PackageConflictError(RuntimeError):
    """Two distributions of one OpenMMLab package are installed over each other."""


def check_packages() -> None:
    """Raise `PackageConflictError` if two distributions that own the same folder are installed."""
    for folder, names in _OWNERS.items():
        installed = {}
        for name in names:
            try:
                installed[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        if len(installed) > 1:
            found = " and ".join(f"{name} {version}" for name, version in installed.items())
            keep = next(iter(installed))
            raise PackageConflictError(
                f"{found} are both installed and own the same folder, {folder}: files of one have overwritten those of"
                f" the other. Remove all and install one again: pip uninstall -y {' '.join(installed)} && pip install"
                f" --no-deps {keep}=={installed[keep]}"
            )
