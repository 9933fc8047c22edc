"""A dict that behaves like a place: the reference for the contract, and for tests."""

from __future__ import annotations

from ..errors import StoreError
from .contract import Data, Names, is_below, split_name, split_prefix, taken


class MemoryStore:
    """Files in this process; gone with the object, shared with no other."""

    degree: str = "local"
    is_remote: bool = False

    def __init__(self, name: str = "") -> None:
        self.place = f"memory of this process ({name or hex(id(self))})"
        self._files: dict[str, bytes] = {}

    def __repr__(self) -> str:
        return f"MemoryStore({len(self._files)} files)"

    def list(self, prefix: str = "") -> Names:
        split_prefix(prefix)
        return sorted(name for name in tuple(self._files) if is_below(name, prefix))

    def read(self, name: str) -> bytes:
        split_name(name)
        if name not in self._files:
            raise StoreError(f"{name} is absent.\n  in: {self.place}\nlist() says what is there.")
        return self._files[name]

    def write(self, name: str, data: Data) -> None:
        split_name(name)
        if name in self._files:
            raise taken(name, self.place)
        self._files[name] = bytes(data)

    def delete(self, name: str) -> None:
        split_name(name)
        self._files.pop(name, None)
