"""House rules that tools do not check: the namespace, sizes of files, and that all is explained."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE_ROOTS = ("services", "router", "experts", "protos")
PACKAGES = (
    "services/expertmesh/client",
    "services/expertmesh/runtime",
    "services/expertmesh/services",
    "router/expertmesh/router",
    "experts/expertmesh/experts",
)
GENERATED = ("_pb2.py", "_pb2_grpc.py")
MAX_LINES = 300


def python_files(*folders: str) -> list[Path]:
    """Files that people write, sorted."""
    found = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    return sorted(file for file in found if not file.name.endswith(GENERATED))


def names(files: list[Path]) -> list[str]:
    """Paths inside the repository."""
    return [str(file.relative_to(ROOT)) for file in files]


def test_the_namespace_belongs_to_no_source_root() -> None:
    for root in SOURCE_ROOTS:
        assert (ROOT / root / "expertmesh").is_dir()
        assert not (ROOT / root / "expertmesh" / "__init__.py").exists()


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_typed_and_whole(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()
    folders = {file.parent for file in (ROOT / package).rglob("*.py")}
    assert names([folder for folder in folders if not (folder / "__init__.py").is_file()]) == []


def test_every_module_says_what_it_is() -> None:
    files = python_files(*SOURCE_ROOTS, "tests", "examples")
    assert len(files) > 100
    silent = [file for file in files if not ast.get_docstring(ast.parse(file.read_text("utf-8")))]
    assert names(silent) == []


def test_no_file_is_too_long_to_read_at_once() -> None:
    files = python_files(*SOURCE_ROOTS, "tests", "examples")
    lengths = {file: len(file.read_text("utf-8").splitlines()) for file in files}
    too_long = [file for file, length in lengths.items() if length > MAX_LINES]
    assert names(too_long) == []


DECLARATION = re.compile(
    r"^\s*(?:(?P<kind>service|message|enum|oneof|rpc)\s+(?P<name>\w+)"
    r"|(?:(?:optional|repeated)\s+)?(?:[\w.]+\s+)?(?P<field>\w+)\s*=\s*\d+\s*;)"
)
RPC = re.compile(r"rpc \w+\((?:stream )?(\w+)\) returns \((?:stream )?(\w+)\)")


def proto_files() -> list[Path]:
    """The committed definitions."""
    return sorted((ROOT / "protos" / "expertmesh" / "v1").glob("*.proto"))


def declarations(text: str) -> Iterator[tuple[str, str]]:
    """(name, its comment or "") of everything declared in a .proto file."""
    above = ""
    for line in text.splitlines():
        match = DECLARATION.match(line)
        if match:
            yield match["name"] or match["field"], above
        above = line.strip().removeprefix("//").strip() if line.strip().startswith("//") else ""


def test_declarations_are_found() -> None:
    text = """
// A.
message A {
  // B.
  optional uint32 b = 1;
  repeated x.Y c = 2;
  oneof d {
  }
}
enum E { }
"""
    assert list(declarations(text)) == [("A", "A."), ("b", "B."), ("c", ""), ("d", ""), ("E", "")]


@pytest.mark.parametrize("file", proto_files(), ids=lambda file: str(file.name))
def test_every_declaration_on_the_wire_is_explained(file: Path) -> None:
    text = file.read_text("utf-8")
    found = list(declarations(text))
    assert len(found) > 3
    # what a call takes and gives is explained at the call
    of_calls = {name for pair in RPC.findall(text) for name in pair}
    assert [name for name, comment in found if not comment and name not in of_calls] == []
