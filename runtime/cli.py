"""The command line `knnmoe`. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .. import __version__
from .cli_support import json_option, progress, reports_errors, show
from .errors import BackendError, InputError

if TYPE_CHECKING:
    from .generation import Event
    from .memory import MemoryPack
    from .model import Model

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

# Kept here so that `--help` need not import what defines them; a test compares.
LAYOUTS = ("split", "fused")
BACKENDS = ("auto", "onnx", "numpy", "numpy-float64", "faiss")
VARIANTS = ("logits", "assignment", "residual")
