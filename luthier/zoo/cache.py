"""Converted models, kept as safetensors so that a slow conversion happens once a machine. A folder appears whole or not at all:
it is written beside its place and moved there in one rename."""

import os
import shutil
import tempfile
import warnings
from pathlib import Path


def folder():
    """`$LUTHIER_CACHE`, or `~/.cache/luthier`."""
    return Path(os.environ.get("LUTHIER_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "luthier")


def converted(key, write):
    """The folder `key` of the cache; `write(folder)` fills it the first time. If unwritable: for this process."""
    place = folder() / "zoo" / key
    if place.is_dir():
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=place.parent))
    except OSError as error:
        part = place = Path(tempfile.mkdtemp(prefix=f"luthier-{key}."))
        warnings.warn(f"The cache {folder()} cannot be written ({error.strerror}); set LUTHIER_CACHE.", stacklevel=3)
        import atexit
        atexit.register(shutil.rmtree, part, ignore_errors=True)
    try:
        write(part)
        if part != place:
            os.chmod(part, 0o755)                    # mkdtemp makes it private
            os.rename(part, place)
    except OSError:
        if not place.is_dir():                       # not merely another process that was quicker
            raise
    finally:
        if part != place:
            shutil.rmtree(part, ignore_errors=True)
    return place
