"""The exceptions that people see: each message names the file or argument, its value and the remedy."""

from __future__ import annotations

from collections.abc import Sequence


class FPTError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigurationError(FPTError):
    """An argument, or a combination of arguments, that cannot work."""


class DataError(FPTError):
    """A data set, manifest or split that cannot be used as it is."""


class OverlapError(DataError):
    """Groups or identical files in several splits."""


class ImageError(DataError):
    """An image file that cannot be read."""


class EncoderError(FPTError):
    """A backbone or a weights file that cannot serve as the frozen encoder."""


class StoreError(FPTError):
    """A feature store that is missing, incomplete or damaged."""


class DamagedStoreError(StoreError):
    """Data of a feature store that are damaged, gone or not those of their row."""


class StaleStoreError(StoreError):
    """A feature store made with other settings than those asked for."""


class CheckpointError(FPTError):
    """A checkpoint that does not belong to this model, encoder or data."""


class OutputError(FPTError):
    """A file or folder that cannot be written."""


class NonFiniteError(FPTError):
    """A model whose outputs are not finite."""


class ExportError(FPTError):
    """A model that cannot be exported, or whose export computes something else."""


def check_at_least(name: str, value: float, least: int) -> None:
    """Hold an argument against the least that it may be.

    Raises:
        ConfigurationError: it is less.
    """
    if value < least:
        raise ConfigurationError(f"{name} is {value}: give {least} or more.")


def a_few(names: Sequence[str], most: int = 5) -> str:
    """A few of the names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def in_one_line(error: BaseException) -> str:
    """Kind and first line of an error of a library, which may have no text or much."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
