"""Copies of bundles with other files in them, and a manifest that says so."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path


def add_file(bundle: Path, target: Path, name: str, content: bytes) -> Path:
    """A copy of a bundle with one file more."""
    shutil.copytree(bundle, target)
    (target / name).write_bytes(content)
    manifest = json.loads((target / "manifest.json").read_text())
    stated = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    manifest["files"][name] = stated
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target
