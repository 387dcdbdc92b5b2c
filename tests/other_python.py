"""Run the runtime's tests on another Python, with neither torch nor onnx installed.

Usage: python tests/other_python.py INTERPRETER...

Takes the first interpreter that exists, runs and is of another version; the bundle for its tests is
made here, where the exporter is. Exit code 0 with a message if there is no other interpreter: a
machine with one Python cannot check this, and says so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv-runtime"
WORK = ROOT / "build" / "other-python"
VERSION = "import sys; print('%d.%d' % sys.version_info[:2])"


def main(interpreters: list[str]) -> int:
    chosen = choose(interpreters)
    if chosen is None:
        print("no other Python (3.10 or newer) found: the runtime was tested on this one only")
        return 0
    interpreter, version = chosen
    print(f"runtime tests on Python {version}, without torch and onnx", flush=True)
    python = environment(interpreter, version)
    bundle = prepare_bundle()
    tests = [str(ROOT / "tests" / "runtime"), "-m", "not slow"]
    return subprocess.run(
        [str(python), "-m", "pytest", *tests],
        cwd=ROOT,
        env={**os.environ, "KNNMOE_TEST_BUNDLE": str(bundle)},
        check=False,
    ).returncode


def choose(interpreters: list[str]) -> tuple[str, str] | None:
    """The first usable interpreter of another version than this one, with its version."""
    for name in interpreters:
        path = shutil.which(name)
        if path is None:
            continue
        found = subprocess.run([path, "-c", VERSION], capture_output=True, text=True, check=False)
        version = found.stdout.strip()
        if found.returncode == 0 and version != "{}.{}".format(*sys.version_info[:2]):
            return path, version
    return None


def environment(interpreter: str, version: str) -> Path:
    """An environment with the base install and what runs the tests, made once."""
    python = ENVIRONMENT / "bin" / "python"
    ready = ENVIRONMENT / f"ready-{version}"
    sources = (ROOT / "pyproject.toml", ROOT / "constraints.txt")
    if ready.is_file() and all(ready.stat().st_mtime > s.stat().st_mtime for s in sources):
        return python
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    subprocess.run([interpreter, "-m", "venv", str(ENVIRONMENT)], check=True)
    pip = [str(python), "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, "-e", f"{ROOT}[chat,faiss]", "hypothesis", "pytest"], check=True)
    ready.touch()
    return python


def prepare_bundle() -> Path:
    """The bundle of the tiny model, exported by this interpreter."""
    sys.path.insert(0, str(ROOT / "tests"))
    from knnmoe.export.exporter import export
    from tiny import make_tiny_olmoe

    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    return export(make_tiny_olmoe(WORK / "checkpoint"), WORK / "bundle").bundle


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
