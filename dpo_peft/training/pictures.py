"""Small pictures of the rows that a run shows, beside its other files: a report has them, nothing publishes them."""

import json
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

from ..data.fields import Row
from ..data.images import Images, thumbnail
from ..files import write_rows

PICTURES = "pictures.jsonl"


def keep_pictures(folder: Path, images: Images | None, rows: Iterable[Row]) -> list[list[str]]:
    """Adds the pictures of prepared rows to `pictures.jsonl`: `image`, a name, and `thumbnail`, a data URI.

    Returns the names of each row's: of the file, if it is one, and a digest of its bytes.
    """
    path, names = folder / PICTURES, list[list[str]]()
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    held = {row["image"]: row for row in map(json.loads, lines)}
    before = len(held)
    for row in rows:
        names.append([])
        for file in images.files(row) if images else ():
            content = file.read()
            digest = blake2b(content, digest_size=6).hexdigest()
            names[-1].append(f"{Path(file.path).name if file.path and file.content is None else 'image'} {digest}")
            if names[-1][-1] not in held:
                held[names[-1][-1]] = {"image": names[-1][-1], "thumbnail": thumbnail(content)}
    if len(held) > before:
        write_rows(path, list(held.values()))
    return names
