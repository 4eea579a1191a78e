"""``make check-wheel``: a wheel has all that the package needs, is small, and works alone, far from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "phi4edge"
LARGEST = 12_000_000  # bytes


def main(wheel: Path) -> None:
    n_bytes = wheel.stat().st_size
    names = zipfile.ZipFile(wheel).namelist()
    embedded = [path for folder in ("nano", "samples") for path in sorted((PACKAGE / folder).iterdir())]
    missing = [str(path) for path in embedded if f"phi4edge/{path.parent.name}/{path.name}" not in names]
    strangers = [name for name in names if not name.startswith(("phi4edge/", "phi4edge-"))]
    if missing or strangers or n_bytes > LARGEST:
        sys.exit(f"{wheel}: {n_bytes:,} bytes of at most {LARGEST:,}; missing: {missing}; too many: {strangers}")
    print(f"{wheel}: {n_bytes:,} bytes, {len(names)} files")
    with tempfile.TemporaryDirectory() as directory:
        _run_alone(wheel.resolve(), Path(directory))


def _run_alone(wheel: Path, directory: Path) -> None:
    """Installs the wheel where nothing else is, and runs the demo from a directory in which nothing is."""
    venv.create(directory / "venv", with_pip=True)
    programs = directory / "venv" / ("Scripts" if os.name == "nt" else "bin")
    elsewhere = directory / "elsewhere"
    elsewhere.mkdir()
    for command in (["python", "-m", "pip", "install", "--quiet", str(wheel)], ["phi4edge", "demo"]):
        subprocess.run([programs / command[0], *command[1:]], cwd=elsewhere, check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
