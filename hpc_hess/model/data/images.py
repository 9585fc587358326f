"""Images as arrays, with their labels: of a .npz file, or of the columns of a data set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hpc_hess.config import DataSection, ModelSection
from hpc_hess.errors import DataError
from hpc_hess.intake.findings import noted
from hpc_hess.model.data.data import Samples
from hpc_hess.model.data.documents import Reading
from hpc_hess.model.data.examples import Example, Rows, column, finished
from hpc_hess.model.data.labels import Labels
from hpc_hess.model.sources.source import Source


def array_rows(path: Path, reading: Reading) -> Iterator[Any]:
    """Yield the rows of the arrays of a .npz file, which all have as many, as records. Raises DataError."""
    if reading.render is None:
        raise DataError(
            f'data.source = arrays:{path} holds images, and no tokens: set model.task = "image-classification", or '
            "data.source to tokens:FILE.npz"
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"cannot read {path} as a .npz file: {error}") from None
    lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"the arrays of {path} have different numbers of rows ({lengths}): they should have the same")
    render = reading.render(reading, path.name)
    for number in range(next(iter(lengths.values()), 0)):
        row = {name: array[number] for name, array in arrays.items()}
        yield render(row, f"{path.name}, row {number}")


def labelled_images(section: DataSection, model: ModelSection, source: Source) -> Samples:
    """Read images [channels, height, width] and their labels. Collective: no. Raises DataError."""
    rows, labels = Rows(section, model, source), Labels(source.hf_config)
    name, label_name = section.image_column, section.label_column or "label"
    dtype = np.float64 if model.master_dtype == "float64" else np.float32

    def examples() -> Iterator[Example]:
        for record, place in rows:
            label = labels(column(record, label_name, "data.label_column", place), f"{place}, column '{label_name}'")
            if label is not None:
                image = _image(column(record, name, "data.image_column", place), source.hf_config, f"{place}, '{name}'")
                if image.dtype == np.uint8:
                    image = image / 255
                    note = noted(
                        "data.columns", f"'{name}' holds bytes: they are divided by 255, and not normalised further"
                    )
                    rows.findings += [note] if note not in rows.findings else []
                yield Example({"pixel_values": image.astype(dtype)}, label, place)

    return finished(rows, labels, examples())


def _image(value: Any, hf_config: Any, place: str) -> np.ndarray:
    """Return an image as the model takes it. Raises DataError."""
    if isinstance(value, Mapping) or hasattr(value, "getpixel"):
        raise DataError(
            f"{place} is an image file: save arrays, such as the image processor's pixel_values, with the datasets library "
            "or as a .npz file"
        )
    try:
        image = np.asarray(value)
    except ValueError:
        image = np.empty(0, object)
    channels = getattr(hf_config, "num_channels", None)
    if image.dtype.kind not in "fiu" or image.ndim != 3 or (channels is not None and image.shape[0] != channels):
        size = "channels" if channels is None else f"{channels} channels"
        raise DataError(
            f"{place} holds {image.dtype} of shape {list(image.shape)}: it should be numbers [{size}, height, width], as "
            "the model takes them"
        )
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise DataError(f"{place} holds numbers that are not finite")
    return image
