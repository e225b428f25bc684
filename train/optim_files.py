"""The optimiser's state of a checkpoint, in one file or in one of each rank that trained.

A rank's file holds rows of tensors. Which, and of what shape the whole is, stands in the file's
own metadata under "rows", as JSON: {name: [shape, [[first row, rows, step], ...]]}. Without a step
from one row to the next it is 1; a name that is not there is whole. So any number of ranks reads
what any other wrote.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from nanofuse.train.errors import UserError
from nanofuse.train.files import not_read, way_out

Rows = Mapping[str, tuple[tuple[int, ...], list[tuple[int, int, int]]]]  # (first, count, step)


def rows_text(rows: Rows) -> dict[str, str]:
    """A file's metadata that says which rows it holds; what is whole in it is left out."""
    partial = {
        name: [shape, places]
        for name, (shape, places) in rows.items()
        if shape and sum(count for _, count, _ in places) < shape[0]
    }
    return {"rows": json.dumps(partial)}


class OptimFiles(Mapping[str, torch.Tensor]):
    """{name: whole tensor} of the files of several ranks; a tensor is read when it is asked for.

    Args:
        paths: of all ranks, in their order; their sums have been compared.

    Raises:
        UserError: a file is missing or cut short, or rows are missing or there twice.
    """

    def __init__(self, paths: list[Path]):
        self.paths = paths
        self._rows: dict[str, list[tuple[Path, int, int, int]]] = {}  # file, first, count, step
        self._shapes: dict[str, tuple[int, ...]] = {}
        try:
            for path in paths:
                self._add(path)
        except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
            raise UserError(not_read(path, error, "is missing or damaged")) from None
        for name, rows in self._rows.items():
            self._check(name, rows)

    @property
    def _hint(self) -> str:
        return way_out(self.paths[0].parent)

    def _add(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            partial = json.loads((file.metadata() or {}).get("rows", "{}"))
            for name in file.keys():
                held = tuple(file.get_slice(name).get_shape())
                shape, rows = partial.get(name, [held, [[0, held[0] if held else 1]]])
                shape = tuple(int(side) for side in shape)
                full = [place if len(place) == 3 else (*place, 1) for place in rows]
                places = [tuple(map(int, place)) for place in full]
                if shape and (sum(count for _, count, _ in places), *shape[1:]) != held:
                    raise ValueError(name)
                if self._shapes.setdefault(name, shape) != shape:
                    raise ValueError(name)
                self._rows.setdefault(name, []).extend((path, *place) for place in places)

    def _check(self, name: str, rows: list[tuple[Path, int, int, int]]) -> None:
        """Refuse a tensor whose rows are not all there once."""
        whole = self._shapes[name][0] if self._shapes[name] else 1
        said = f"rows of {name} are missing or there twice; {self._hint}"
        if sum(count for _, _, count, _ in rows) != whole:
            raise UserError(said)
        seen = torch.zeros(whole, dtype=torch.bool)
        for _, at, count, step in rows:
            if at < 0 or step < 1 or count < 0 or at + (count - 1) * step >= whole:
                raise UserError(said)
            seen[at::step][:count] = True
        if not seen.all():
            raise UserError(said)

    def __getitem__(self, name: str) -> torch.Tensor:
        rows, shape = self._rows[name], self._shapes[name]
        whole = None
        start = {path: 0 for path, *_ in rows}
        for path, at, count, step in rows:
            with safe_open(path, framework="pt") as file:
                if not shape:
                    return file.get_tensor(name)
                part = file.get_slice(name)[start[path] : start[path] + count]
            if whole is None:
                whole = part.new_empty(shape)
            whole[at::step][:count] = part
            start[path] += count
        assert whole is not None
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)
