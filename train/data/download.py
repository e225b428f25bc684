"""ClimbMix shards from the Hugging Face hub, checked and renamed into place.

The last shard of the data set is nanochat's validation shard and is always fetched, so that
figures compare (https://huggingface.co/datasets/karpathy/climbmix-400b-shuffle).
"""

import contextlib
import hashlib
import os
import queue
import shutil
import threading
import time
from pathlib import Path

from tqdm import tqdm

from nanofuse.train.errors import UserError
from nanofuse.train.files import make_folder

REPO = "karpathy/climbmix-400b-shuffle"
LAST_SHARD = 6542
ATTEMPTS = 5
BACKOFF_SECONDS = 1.0
CHUNK = 1 << 20
ANSWER_SECONDS = 60  # for the list of shards


def shard_name(index):
    return f"shard_{index:05d}.parquet"


def sha256_of(path):
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def is_complete(path, size, sha256):
    """Whether the file is there with this size and, where one is known, this checksum."""
    return (
        path.is_file()
        and path.stat().st_size == size
        and (sha256 is None or sha256_of(path) == sha256)
    )


def _first_line(error):
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def fetch_shard(hub, name, directory, size, sha256):
    """Fetch one shard into `directory`, verified; returns its path.

    Raises:
        UserError: the shard did not arrive whole after ATTEMPTS tries.
    """
    path = directory / name
    if is_complete(path, size, sha256):
        return path
    partial = directory / f".{name}.partial"
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(BACKOFF_SECONDS * 2 ** (attempt - 1))
        try:
            got = Path(hub.hf_hub_download(REPO, name, repo_type="dataset", local_dir=partial))
            if is_complete(got, size, sha256):
                os.replace(got, path)
                shutil.rmtree(partial, ignore_errors=True)
                return path
            reason = "size or checksum differ from the hub's"
            shutil.rmtree(partial, ignore_errors=True)
        except Exception as error:  # the hub's HTTP client, and so its errors, vary by version
            reason = _first_line(error)
    raise UserError(f"{name} did not arrive after {ATTEMPTS} attempts ({reason}); try again later")


def outcome(function, *args, **options):
    """(what it returns, None), or (None, what it raised)."""
    try:
        return function(*args, **options), None
    except Exception as error:
        return None, error


def listing(hub, names):
    """{name: (bytes, SHA-256 or None)} of those shards that the hub has.

    Raises:
        UserError: it cannot be reached, does not answer, or answers otherwise than it should.
    """
    answers = queue.SimpleQueue()

    def ask():
        answers.put(outcome(hub.HfApi().get_paths_info, REPO, names, repo_type="dataset"))

    threading.Thread(target=ask, daemon=True).start()
    try:
        entries, error = answers.get(timeout=ANSWER_SECONDS)
    except queue.Empty:
        what = f"the hub does not answer within {ANSWER_SECONDS} s"
        raise UserError(f"{what}; check the network, or try again later") from None
    if error:  # the hub's HTTP client, and so its errors, vary by version
        if getattr(error, "response", None) is None:
            raise UserError(f"the hub cannot be reached ({_first_line(error)}); check the network")
        raise UserError(f"the hub refuses ({_first_line(error)}); try again later")
    found, wanted = {}, set(names)
    for entry in entries:
        size, lfs = getattr(entry, "size", None), getattr(entry, "lfs", None)
        if not isinstance(size, int) or size < 0:
            raise UserError(f"the hub has no size for {entry.path}; try again later")
        if entry.path in wanted:
            found[entry.path] = size, lfs.sha256 if lfs else None
    return found


def refuse_folder(directory):
    """Refuse a folder that cannot be one, before anything is asked for.

    Raises:
        UserError: it, or the first one above it that is there, is a file or may not be written to.
    """
    there = next(p for p in (directory, *directory.absolute().parents) if os.path.lexists(p))
    if not os.path.isdir(there):
        raise UserError(f"{there} is not a folder; move it away, or name another --data")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{there} may not be written to; name another --data")


def download_shards(directory, num_shards, workers=4, hub=None):
    """Fetch the first num_shards training shards and the validation shard, in parallel.

    Whole shards already there are kept. `hub` is the huggingface_hub module.

    Returns:
        The shards' paths, in name order.

    Raises:
        UserError: huggingface_hub is missing, the hub cannot be reached, or a shard fails.
    """
    if hub is None:
        try:
            import huggingface_hub as hub
        except ImportError:
            raise UserError(
                "download needs huggingface_hub; install it with pip install -e '.[hub]'"
            ) from None
    indices = [*range(min(num_shards, LAST_SHARD)), LAST_SHARD]
    names = [shard_name(i) for i in indices]
    refuse_folder(directory)
    entries = listing(hub, names)
    missing = [name for name in names if name not in entries]
    if missing:
        raise UserError(f"{REPO} has no {missing[0]}; ask for fewer shards with -n")
    make_folder(directory)
    todo, done = queue.SimpleQueue(), queue.SimpleQueue()
    for name in names:
        todo.put(name)

    def work():
        while not todo.empty():
            with contextlib.suppress(queue.Empty):
                name = todo.get_nowait()
                done.put(outcome(fetch_shard, hub, name, directory, *entries[name]))

    # threads that end with the process: a signal or a failure need not wait for whole shards
    for _ in range(workers):
        threading.Thread(target=work, daemon=True).start()
    paths, total = [], sum(size for size, _ in entries.values())
    try:
        with tqdm(total=total, unit="B", unit_scale=True, desc="shards") as bar:
            for _ in names:
                path, error = done.get()
                if error:
                    raise error
                paths.append(path)
                bar.update(entries[path.name][0])
    finally:
        while not todo.empty():
            with contextlib.suppress(queue.Empty):
                todo.get_nowait()
    return sorted(paths)
