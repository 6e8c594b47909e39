"""Tensors kept on disk by key: written in safetensors files of some megabytes, read memory-mapped.

Several processes on one machine may share a folder: each writes files of its own and finds those of the others.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from weightlora import durable

SHARD_BYTES = 64 * 2**20


class RowStore:
    """A mapping from text keys to tensors of any shape; entries never change.

    Args:
        folder: exists, and holds nothing but rows.
        rank: distinguishes the files of several processes.
        shard_bytes: rows wait in memory until they fill a file of this size.

    Raises:
        OSError: when rows are put in, where a file cannot be written or the disk is about to be full.
    """

    def __init__(self, folder: Path, *, rank: int = 0, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        self._rank = rank
        self._shard_bytes = shard_bytes
        self._waiting: dict[str, Tensor] = {}
        self._waiting_bytes = 0
        self._homes: dict[str, Any] = {}  # key -> the open file that holds it
        self._files: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._waiting or key in self._homes

    def __len__(self) -> int:
        return len(self._waiting.keys() | self._homes.keys())

    def __getitem__(self, key: str) -> Tensor:
        return self._waiting[key] if key in self._waiting else self._homes[key].get_tensor(key)

    def __setitem__(self, key: str, row: Tensor) -> None:
        self._waiting[key] = row.detach().cpu().contiguous().clone()
        self._waiting_bytes += row.numel() * row.element_size()
        if self._waiting_bytes >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write the rows that wait in memory, so that other processes find them."""
        from safetensors.torch import save_file

        if not self._waiting:
            return
        if shutil.disk_usage(self.folder).free < 2 * self._waiting_bytes:
            raise OSError(f"the disk of {self.folder} is full")
        name = f"rows-{self._rank}-{len(self._files)}.safetensors"
        with durable.replacing(self.folder / name) as draft:
            save_file(self._waiting, draft)
        self._open(self.folder / name)
        self._waiting, self._waiting_bytes = {}, 0

    def refresh(self) -> None:
        """Find the files that other processes have written since."""
        for file in sorted(self.folder.glob("*.safetensors")):
            if file.name not in self._files:
                self._open(file)

    def close(self) -> None:
        """Release every file, so that the folder can be removed."""
        self._homes, self._waiting = {}, {}

    def _open(self, file: Path) -> None:
        from safetensors import safe_open

        handle: Any = safe_open(file, framework="pt")
        self._files.add(file.name)
        self._homes.update((key, handle) for key in handle.keys())
