"""Compiled kernels as one file, made on any machine and used where the GPU is.

A file is a ZIP of entries of the caches of Triton and FlashAttention 4, without the intermediate
code, and a header that names all they depend on, and holds which algorithms of products were
measured to be fastest, where they were. An entry is named by its cache and its place
there: "triton/KEY" is a folder, "flash/FINGERPRINT/FUNCTION/KEY.o" a file. Compiled kernels run
with the user's rights: a file is to be trusted as much as the code beside it.
"""

import hashlib
import json
import platform
import re
import secrets
import shutil
import sys
import zipfile
from pathlib import Path

from nanofuse.kernels.common.store import PRODUCTS, Store, sections_of, user_folder
from nanofuse.train.errors import UserError

FORMAT = 1
HEADER = "nanofuse-kernels.json"
KERNELS = Path(__file__).parents[1] / "kernels"
SHIPPED = (".cubin", ".json", ".so")  # of a folder of Triton's: what a launch reads
GROUP = "__grp__"  # prefix of the file that lists a folder's others, by absolute path
NAME = re.compile(r"(triton/[A-Z2-7]+/[\w.-]+)|(flash/[0-9a-f]+/\w+/[0-9a-f]+\.o)")
LARGEST = 2**28  # bytes of a file of an entry
REQUESTS = "kernels.json"  # of the user's folder: which entries the runs so far needed


def triton_entry(key):
    """Name of a folder of Triton's cache."""
    return f"triton/{key}"


def flash_entry(path):
    """Name of a file of FlashAttention 4's cache."""
    return "/".join(("flash", *Path(path).parts[-3:]))


def place(entry):
    """Path of an entry, there or not."""
    cache, _, rest = entry.partition("/")
    if cache == "triton":
        from nanofuse.kernels.common import ahead

        return ahead.cache_folder() / rest
    from nanofuse.model.backends import flash_ahead

    return flash_ahead.cache_folder() / rest


def sources():
    """Digest of the kernels' code and launch configurations; not of what compiles them."""
    digest = hashlib.sha256()
    found = [*KERNELS.rglob("*.py"), *KERNELS.rglob("*.json")]
    for path in sorted(path for path in found if path.name != "ahead.py"):
        digest.update(path.relative_to(KERNELS).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def conditions(capability):
    """{what compiled kernels depend on: its value here} for GPUs of a compute capability."""
    from nanofuse.kernels.common import ahead
    from nanofuse.model.backends import flash_ahead

    major, minor = capability
    return {
        "GPUs": f"sm_{major}{minor}",
        "machine": f"{platform.system()} {platform.machine()}",
        "Python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "Triton": ahead.build(),
        "the kernels' sources": sources()[:12],
        "FlashAttention 4": flash_ahead.versions(),
    }


class Needed:
    """Which entries the runs so far needed, kept for the next start, by Request.

    Args:
        capability: of the GPU.
    """

    def __init__(self, capability):
        section = json.dumps(conditions(capability), sort_keys=True)
        self.store = Store(user_folder() / REQUESTS, section)

    def there(self, request):
        """How many entries a Request needs, if all of them are there; else None."""
        entries = self.store.entries().get(request.digest())
        if not entries or not isinstance(entries, list):
            return None
        return len(entries) if all(place(str(entry)).exists() for entry in entries) else None

    def add(self, requests):
        """Keep {digest of a Request: its entries}."""
        self.store.add(requests)


def measured_products(gpu):
    """{section: entries} of the choices of products that were measured on GPUs of this name."""
    found = sections_of(user_folder() / PRODUCTS)
    return {
        section: entries
        for section, entries in found.items()
        if section.startswith(f"{gpu}, ") and isinstance(entries, dict)
    }


def pack(path, conditions, request, entries, products=None):
    """Write the file.

    Args:
        conditions: of `conditions`.
        request: the Request that was compiled.
        entries: its names.
        products: of `measured_products`.

    Returns:
        bytes of the file.
    """
    header = {
        "format": FORMAT,
        "conditions": conditions,
        "requests": {request.digest(): sorted(entries)},
        "products": products or {},
    }
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            archive.writestr(HEADER, json.dumps(header, indent=1))
            for entry in sorted(entries):
                at = place(entry)
                files = [(entry, at)] if at.is_file() else []
                if at.is_dir():
                    files = [(f"{entry}/{file.name}", file) for file in sorted(at.iterdir())]
                for name, file in files:
                    if file.name.endswith(SHIPPED) or name.startswith("flash/"):
                        archive.write(file, name)
        temporary.replace(path)
    except OSError as error:
        error.filename = str(path)  # the temporary name says nothing to the user
        raise
    finally:
        temporary.unlink(missing_ok=True)
    return path.stat().st_size


def _refuse(path, reason):
    return UserError(
        f"--kernel-cache {path}: {reason}; make it anew with python -m train.warm, or drop the flag"
    )


def _header(path, archive):
    try:
        header = json.loads(archive.read(HEADER))
        made = header["format"]
        products = {name: dict(kept) for name, kept in header.get("products", {}).items()}
        found = dict(header["conditions"]), dict(header["requests"]), products
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _refuse(path, "it is not of compiled kernels") from error
    if made != FORMAT:
        raise _refuse(path, f"its format is {made}, not {FORMAT}")
    return found


def unpack(path, capability):
    """Put the entries of a file into the caches, and its choices of products into the user's file,
    where they are missing.

    Args:
        path: of the file.
        capability: of the GPU.

    Returns:
        how many kernels' entries the file has.

    Raises:
        UserError: it cannot be read, or was made for other conditions than there are here.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            theirs, requests, products = _header(path, archive)
            for name, here in conditions(capability).items():
                if name == "FlashAttention 4" and None in (here, theirs.get(name)):
                    continue  # the run or the file does without
                if theirs.get(name) != here:
                    raise _refuse(path, f"it is for {name} {theirs.get(name)}, here: {here}")
            folders = {}
            for info in archive.infolist():
                if info.filename == HEADER:
                    continue
                if not NAME.fullmatch(info.filename) or info.file_size > LARGEST:
                    raise _refuse(path, f"it has a file that is no kernel's, {info.filename!r}")
                folder, _, name = info.filename.rpartition("/")
                folders.setdefault(folder, []).append((name, info))
            for folder, files in folders.items():
                if folder.startswith("triton/") or theirs.get("FlashAttention 4"):
                    _write(folder, files, archive)
    except OSError as error:
        raise UserError(f"--kernel-cache {path}: {error.strerror or error}") from None
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError) as error:
        raise _refuse(path, "it is damaged, or no file of compiled kernels") from error
    Needed(capability).add(requests)
    for section, kept in products.items():
        store = Store(user_folder() / PRODUCTS, section)
        there = store.entries()
        if new := {key: entry for key, entry in kept.items() if key not in there}:
            store.add(new)
    return len(folders)


def _write(folder, files, archive):
    """Write the files of a folder of a cache; a folder of Triton's appears as a whole."""
    target = place(folder)
    if folder.startswith("flash/"):
        target.mkdir(parents=True, exist_ok=True)
        for name, info in files:
            if not (target / name).exists():
                temporary = target / f".{name}.{secrets.token_hex(4)}"
                temporary.write_bytes(archive.read(info))
                temporary.replace(target / name)
        return
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    temporary.mkdir()
    names = [name for name, _ in files if not name.startswith(GROUP)]
    for name, info in files:
        content = archive.read(info)
        if name.startswith(GROUP):  # the paths of this machine
            content = json.dumps({"child_paths": {n: str(target / n) for n in names}}).encode()
        (temporary / name).write_bytes(content)
    try:
        temporary.rename(target)
    except OSError:  # another process was first
        shutil.rmtree(temporary)
