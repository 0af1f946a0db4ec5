"""Real text out of Debian packages: where the unpacked packages lie, and how they get there."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from peftk.atomic import write_folder

# By Debian package a file of it: what it is used for.
PACKAGES = {
    "wordnet-base": "usr/share/wordnet/data.noun",  # WordNet 3.0, its own permissive licence
    "sword-text-web": "usr/share/sword/modules/texts/ztext/engWEB2015eb/ot.bzz",  # World English Bible, public domain
    "sword-text-sparv": "usr/share/sword/modules/texts/ztext/spaRV1909eb/ot.bzz",  # Reina Valera 1909, public domain
}


def cache_folder() -> Path:
    """Where ``fetch`` unpacks the packages, unless told otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peftk" / "corpora"


def find(folder: Path, package: str) -> Path:
    """The file of ``package`` below ``folder`` that PACKAGES names; FileNotFoundError says how to get it."""
    path = folder / PACKAGES[package]
    if not path.is_file():
        raise FileNotFoundError(
            f"--corpora {folder}: expected the Debian package {package} unpacked there ({PACKAGES[package]}), found none; "
            f"run  python -m bench.papers fetch --corpora {folder}"
        )
    return path


def fetch(folder: Path, archives: Path | None = None) -> list[str]:
    """Unpack every package that ``folder`` lacks: from the .deb files in ``archives``, else from the machine's own mirror
    (``apt-get download``, nothing is installed). Returns the names of the packages that were unpacked. RuntimeError where there
    is no apt-get or dpkg, or one of them fails; then ``folder`` is as before."""
    missing = [package for package, file in PACKAGES.items() if not (folder / file).is_file()]
    if not missing:
        return []
    with write_folder(folder) as whole, tempfile.TemporaryDirectory() as downloads:
        if folder.is_dir():
            shutil.copytree(folder, whole, dirs_exist_ok=True)
        if archives is None:
            _run(["apt-get", "download", *missing], Path(downloads))
        for package in missing:
            place = archives or Path(downloads)
            found = sorted(place.glob(f"{package}_*.deb"))
            if not found:
                raise RuntimeError(f"{place}: expected {package}_*.deb, found none")
            _run(["dpkg", "-x", str(found[-1]), str(whole)], place)
    return missing


def _run(command: list[str], folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise RuntimeError(f"{command[0]}: expected on this machine to get Debian packages, found none; give --corpora FOLDER")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
