"""The layout: what may import what, file sizes, and the two names that must not be shadowed."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "kvpress": ROOT / "kvpress",
    "kvpress_kernels": ROOT / "kernels" / "kvpress_kernels",
    "kvpress_eval": ROOT / "eval" / "kvpress_eval",
}
FORBIDDEN = {"kvpress_kernels": {"kvpress", "kvpress_eval"}, "kvpress": {"kvpress_eval"}, "kvpress_eval": set()}
MAX_LINES = 320
SOURCES = [(name, path) for name, folder in PACKAGES.items() for path in sorted(folder.rglob("*.py"))]


def python(code: str, *path_entries: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter from the repository root, with `path_entries` first on `sys.path`."""
    entries = [*path_entries, ROOT, ROOT / "kernels", ROOT / "eval"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, entries))}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)


def imported_packages(source: str) -> set[str]:
    """Top-level packages that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_transformers_imports_from_the_repository_root():
    # a regular package `kernels` in the working directory shadows the Hugging Face distribution of that name
    result = python("import transformers, transformers.integrations.hub_kernels")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("folder", ["kernels", "eval"])
def test_source_roots_are_no_packages(folder):
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize(("package", "path"), SOURCES, ids=[str(p.relative_to(ROOT)) for _, p in SOURCES])
def test_import_direction_and_size(package, path):
    source = path.read_text(encoding="utf-8")
    assert not imported_packages(source) & FORBIDDEN[package]
    assert len(source.splitlines()) <= MAX_LINES, "one concept a file: split it"


def fake_distribution(folder: Path, name: str) -> Path:
    info = folder / f"{name.replace('-', '_')}-9.9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n")
    return folder


def test_import_stops_beside_the_namesake(tmp_path):
    result = python("import kvpress", fake_distribution(tmp_path, "kvpress"))
    assert result.returncode != 0
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError:")
    assert "'kvpress' (NVIDIA's, version 9.9)" in message
    assert "'kvpress-engine'" in message
    assert "pip uninstall" in message


def test_own_distribution_is_no_namesake(tmp_path):
    code = "from kvpress._guard import refuse_namesake; refuse_namesake()"
    result = python(code, fake_distribution(tmp_path, "kvpress-engine"))
    assert result.returncode == 0, result.stderr
