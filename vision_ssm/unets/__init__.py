"""Encoder-decoders for medical image segmentation, one file each.

A new family is one new file: it is found here and registers itself.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

from .base import UNet, load_encoder  # noqa: E402  (after discovery, which finds them like any other)
from .encoder_unet import unet  # noqa: E402

__all__ = ["UNet", "load_encoder", "unet"]
