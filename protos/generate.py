"""Regenerate the committed protobuf code, or check that it is up to date.

`python protos/generate.py` writes; with `--check` it compares and exits 1 on a difference.
"""

import argparse
import filecmp
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
PACKAGE = Path("expertmesh/v1")


def _include_dirs() -> list[str]:
    """Folders with google/protobuf (grpcio-tools) and google/rpc (googleapis-common-protos)."""
    tools = importlib.util.find_spec("grpc_tools")
    rpc = importlib.util.find_spec("google.rpc")
    assert tools
    assert tools.origin
    assert rpc
    assert rpc.submodule_search_locations
    return [
        str(Path(tools.origin).parent / "_proto"),
        str(Path(next(iter(rpc.submodule_search_locations))).parents[1]),
    ]


def _protoc(protos: list[Path], out: Path, *, services: bool) -> None:
    includes = [f"-I{ROOT}", *(f"-I{folder}" for folder in _include_dirs())]
    # protoc looks for plugins on PATH only, which an unactivated venv is not on
    bin_dir = Path(sys.executable).parent
    plugins = [f"--plugin={bin_dir / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]
    outputs = [f"--python_out={out}", f"--mypy_out=quiet:{out}"]
    if services:
        outputs += [f"--grpc_python_out={out}", f"--mypy_grpc_out=quiet:{out}"]
    command = [sys.executable, "-m", "grpc_tools.protoc", *includes, *plugins, *outputs]
    subprocess.run([*command, *map(str, protos)], check=True, cwd=ROOT)


def generate(out: Path) -> None:
    """Write the generated modules of every .proto under `out`."""
    protos = sorted((ROOT / PACKAGE).glob("*.proto"))
    with_service = [p for p in protos if "\nservice " in p.read_text()]
    _protoc([p for p in protos if p not in with_service], out, services=False)
    _protoc(with_service, out, services=True)


def _generated(folder: Path) -> dict[str, Path]:
    return {p.name: p for p in (folder / PACKAGE).glob("*_pb2*")}


def check() -> list[str]:
    """Names of committed files that differ from a fresh generation."""
    with tempfile.TemporaryDirectory() as tmp:
        (Path(tmp) / PACKAGE).mkdir(parents=True)
        generate(Path(tmp))
        fresh, committed = _generated(Path(tmp)), _generated(ROOT)
        return sorted(
            name
            for name in fresh.keys() | committed.keys()
            if name not in fresh
            or name not in committed
            or not filecmp.cmp(fresh[name], committed[name], shallow=False)
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only")
    if not parser.parse_args().check:
        for stale in _generated(ROOT).values():
            stale.unlink()
        generate(ROOT)
        return 0
    stale_names = check()
    if stale_names:
        print("stale: " + ", ".join(stale_names) + "; run `make protos` and commit the result")
    return int(bool(stale_names))


if __name__ == "__main__":
    sys.exit(main())
