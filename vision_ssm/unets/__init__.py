"""Encoder-decoders for medical image segmentation."""
