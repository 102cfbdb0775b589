"""Captioned images, in the forms in which they are published."""

from retrieval.datasets.captioned import (
    CaptionDataset,
    DatasetError,
    load_captions,
    load_karpathy,
    load_webdataset,
)

__all__ = ["CaptionDataset", "DatasetError", "load_captions", "load_karpathy", "load_webdataset"]
