"""ClimbMix shards from the Hugging Face hub, checked and renamed into place.

The last shard of the data set is nanochat's validation shard and is always fetched, so that
figures compare (https://huggingface.co/datasets/karpathy/climbmix-400b-shuffle).
"""

import hashlib
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from nanofuse.train.errors import UserError
from nanofuse.train.files import make_folder

REPO = "karpathy/climbmix-400b-shuffle"
LAST_SHARD = 6542
ATTEMPTS = 5
BACKOFF_SECONDS = 1.0
CHUNK = 1 << 20


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
    try:
        entries = hub.HfApi().get_paths_info(
            REPO, [shard_name(i) for i in indices], repo_type="dataset"
        )
    except Exception as error:  # as above
        reason = _first_line(error)
        raise UserError(f"the hub cannot be reached ({reason}); check the network") from None
    checksums = {e.path: (e.size, e.lfs.sha256 if e.lfs else None) for e in entries}
    missing = [shard_name(i) for i in indices if shard_name(i) not in checksums]
    if missing:
        raise UserError(f"{REPO} has no {missing[0]}; ask for fewer shards with -n")
    total = sum(size for size, _ in checksums.values())
    make_folder(directory)
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="shards") as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        jobs = {
            pool.submit(fetch_shard, hub, name, directory, size, sha256): size
            for name, (size, sha256) in checksums.items()
        }
        try:
            paths = []
            for job in as_completed(jobs):
                paths.append(job.result())
                bar.update(jobs[job])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return sorted(paths)
