"""Lays out the root of the image: one Python, one environment, the libraries that both need, and nothing else.

It runs in the build stage of the Dockerfile, with the base image's own Python and its standard library alone:
``rootfs.py base ENVIRONMENT ROOT`` before our package is in the environment, ``rootfs.py package ENVIRONMENT ROOT`` after.
So what is large and changes seldom is a layer of its own, the same at every build. What a scanner needs to know what is
inside stays: the environment's dist-info, and dpkg's record and copyright of every package that a library came from.
"""

import compileall
import os
import py_compile
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

USER, UID = "checkpoint", 65532
PACKAGE = "checkpoint_operator"
COMMANDS = {"operator": "checkpoint-operator", "mover": "checkpoint-mover"}

# Of the standard library: what installs, tests and draws, and the bindings to libraries that nothing here calls.
STDLIB_WITHOUT = (
    *("__pycache__", "site-packages", "dist-packages", "config-*", "EXTERNALLY-MANAGED", "sitecustomize.py"),
    *("test", "idlelib", "turtledemo", "turtle.py", "tkinter", "ensurepip", "lib2to3", "pydoc_data"),
    *("_tkinter*.so", "_test*.so", "_ctypes_test*.so", "xx*.so", "_xx*.so"),
    *("_curses*.so", "readline*.so", "_dbm*.so", "_gdbm*.so", "_sqlite3*.so", "curses", "sqlite3", "dbm"),
)
# botocore describes every service of AWS; these are S3, and those that may be asked for its keys.
BOTOCORE_SERVICES = frozenset({"s3", "sts", "sso", "sso-oidc", "signin"})
# What compilers and type checkers read.
UNUSED = ("*.pyi", "*.pyx", "*.pxd", "*.c", "*.h", "*.a")
EPOCH = 315532800  # 1980-01-01, the earliest that a zip file can say


def copy_python(root: Path) -> None:
    """The interpreter and its standard library, at the paths where the base has them."""
    interpreter = Path(sys.executable).resolve()
    _copy(interpreter, root)
    stdlib = Path(sysconfig.get_path("stdlib"))
    shutil.copytree(stdlib, _inside(root, stdlib), ignore=shutil.ignore_patterns(*STDLIB_WITHOUT))


def copy_environment(environment: Path, root: Path) -> None:
    """The environment, without anybody's commands and without activation scripts."""
    target = _inside(root, environment)
    shutil.copytree(
        environment, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "bin", "include", "lib64")
    )
    (target / "bin").mkdir()
    for name in ("python", "python3"):
        (target / "bin" / name).symlink_to(Path(sys.executable).resolve())
    for data in target.glob("lib/python*/site-packages/botocore/data"):
        for folder in data.iterdir():
            if folder.is_dir() and folder.name not in BOTOCORE_SERVICES:
                shutil.rmtree(folder)
    for data in target.glob("lib/python*/site-packages/boto3/data"):
        shutil.rmtree(data)  # of its resources, which nothing here uses


def copy_package(environment: Path, root: Path) -> None:
    """Our package, and its commands with their short names beside them."""
    for path in environment.glob(f"lib/python*/site-packages/{PACKAGE}*"):
        shutil.copytree(path, _inside(root, path), ignore=shutil.ignore_patterns("__pycache__"))
    for short, command in COMMANDS.items():
        _copy(environment / "bin" / command, root)
        _inside(root, environment / "bin" / short).symlink_to(command)


def compile_everything(root: Path, folders: Iterable[Path]) -> None:
    """Bytecode that is believed without a look at its source: the image does not change."""
    for folder in folders:
        done = compileall.compile_dir(
            _inside(root, folder),
            maxlevels=32,
            quiet=1,
            stripdir=str(root),
            prependdir="/",
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )
        if not done:
            raise SystemExit(f"something below {folder} does not compile")


def copy_libraries(root: Path) -> None:
    """The shared libraries that anything in the root needs, with the loader and its cache."""
    binaries = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink() and _is_elf(path)]
    # By the name that the loader looks for, each may be a link to a file of another name.
    for library in sorted({library for path in binaries for library in _libraries(path, root)}):
        _copy(library, root)
    _copy(Path("/etc/ld.so.cache"), root)
    for link in ("/bin", "/lib", "/lib64"):
        # A base that has them as links into /usr names its loader by them.
        if os.path.islink(link) and not (root / link[1:]).exists():
            (root / link[1:]).symlink_to(os.readlink(link))


def _libraries(binary: Path, root: Path) -> set[Path]:
    shown = subprocess.run(["ldd", str(binary)], capture_output=True, text=True, check=False)
    if "not found" in shown.stdout:
        raise SystemExit(f"{binary} needs a library that the base does not have:\n{shown.stdout}")
    found = {Path(path) for path in re.findall(r"(?:^\s+|=> )(/\S+) \(0x", shown.stdout, re.MULTILINE)}
    return {path for path in found if not path.is_relative_to(root)}


def write_etc(root: Path) -> None:
    """What resolving names, verifying certificates and asking for one's own name read."""
    etc = root / "etc"
    etc.mkdir(exist_ok=True)
    (etc / "passwd").write_text(
        f"root:x:0:0:root:/:/sbin/nologin\n{USER}:x:{UID}:{UID}:checkpoint operator:/tmp:/sbin/nologin\n"
    )
    (etc / "group").write_text(f"root:x:0:\n{USER}:x:{UID}:\n")
    (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files dns\n")
    _copy(Path("/etc/os-release"), root)
    _copy(Path("/etc/ssl/certs/ca-certificates.crt"), root)
    (root / "tmp").mkdir(exist_ok=True)
    (root / "tmp").chmod(0o1777)


def record_packages(files: Iterable[Path], root: Path) -> None:
    """dpkg's record of what the files came from, where scanners of images without dpkg look for it."""
    info = Path("/var/lib/dpkg/info")
    wanted = {variant for path in files for variant in _names_of(path)}
    packages = {listing.stem for listing in info.glob("*.list") if not wanted.isdisjoint(listing.read_text().splitlines())}
    packages.add("ca-certificates")
    records = root / "var" / "lib" / "dpkg" / "status.d"
    records.mkdir(parents=True)
    for stanza in Path("/var/lib/dpkg/status").read_text().split("\n\n"):
        fields = dict(re.findall(r"^(Package|Architecture): (.+)$", stanza, re.MULTILINE))
        name = fields.get("Package", "")
        if name in packages or f"{name}:{fields.get('Architecture')}" in packages:
            (records / name).write_text(stanza.strip() + "\n")
            licence = Path("/usr/share/doc") / name / "copyright"
            if licence.exists():
                _copy(licence, root)


def _names_of(path: Path) -> set[str]:
    """dpkg knows a file by the path in its package, which may be the one before /lib became a link to /usr/lib."""
    real = str(path.resolve())
    return {str(path), real, real.removeprefix("/usr"), f"/usr{path}"}


def _is_elf(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(4) == b"\x7fELF"


def _copy(path: Path, root: Path) -> None:
    """The content of a file, under its own name and, where folders on its way are links, below what they point to."""
    target = _inside(root, path.parent.resolve() / path.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        shutil.copy2(path, target)


def _inside(root: Path, path: Path) -> Path:
    return root / path.relative_to("/")


def remove(root: Path, patterns: Iterable[str]) -> None:
    """Files by name, wherever they lie."""
    for path in list(root.rglob("*")):
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in patterns):
            path.unlink()


def settle(root: Path) -> None:
    """One time for all files: the same content makes the same layer."""
    for path in [root, *root.rglob("*")]:
        os.utime(path, (EPOCH, EPOCH), follow_symlinks=False)


def main() -> None:
    what = sys.argv[1]
    environment, root = (Path(argument) for argument in sys.argv[2:])
    root.mkdir()
    if what == "base":
        copy_python(root)
        copy_environment(environment, root)
        remove(root, UNUSED)
        compile_everything(root, (Path(sysconfig.get_path("stdlib")), environment))
        copy_libraries(root)
        from_base = [Path("/") / path.relative_to(root) for path in root.rglob("*") if path.is_file()]
        record_packages([path for path in from_base if not path.is_relative_to(environment)], root)
        write_etc(root)
    else:
        copy_package(environment, root)
        compile_everything(root, (environment,))
    settle(root)
    megabytes = sum(path.stat().st_size for path in root.rglob("*") if path.is_file() and not path.is_symlink()) / 1e6
    print(f"{root}: {megabytes:.1f} MB")


if __name__ == "__main__":
    main()
