"""The sessions and populations found in every place, told from their manifests alone.

Nothing is written, no payload is read, and nobody is asked for their Drive: a place that cannot be
searched is a problem told beside what the others hold. One row is a session in one place, so a session
that was copied has two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbtrain import host, judging
from nbtrain.errors import NbtrainError
from nbtrain.host import Host
from nbtrain.stores import MANIFEST, FolderStore, Store, find_store

LOCAL = "nbtrain-sessions"


@dataclass(frozen=True)
class Found:
    """A session in one place."""

    name: str
    place: str
    step: int  # this and the next three are the newest checkpoint's
    progress: float  # in epochs
    stage: int
    saved_at: float | None  # time.time() of the commit, None where the manifest has none
    best: float | None  # best score kept there; a population's best score
    num_bytes: int  # of all checkpoints there
    kind: str = "session"  # or "population, 10 members, round 3"


def sessions(store: str | None = None, here: Host | None = None) -> tuple[list[Found], list[str]]:
    """Return the sessions found, by name and then the nearest place, and what kept from looking.

    Args:
        store: Look only there: a folder or a URL; None is every place that this host knows.
        here: The host; None finds out.
    """
    from nbtrain import checkpoint  # with torch, which looking for names does without

    found: list[Found] = []
    problems: list[str] = []
    for place in _places(store, here or host.detect(), problems):
        try:
            names = checkpoint.sessions([place])
        except NbtrainError as error:
            problems.append(str(error))
            continue
        for name in names:
            try:
                manifests = checkpoint.find([place], name)
            except NbtrainError as error:
                problems.append(str(error))
                continue
            if not manifests:  # what looks like one is not ours, and was named in a warning
                continue
            facts, best = manifests[0].facts, checkpoint.best_of(manifests)
            judged = None if best is None else judging.score(best.facts)
            score = facts["population"][2] if "population" in facts else None
            found.append(
                Found(
                    name=name,
                    place=place.place,
                    step=facts["step"],
                    progress=facts["progress"],
                    stage=facts["stage"],
                    saved_at=facts.get("at"),
                    best=score if judged is None else judged[2],
                    num_bytes=sum(manifest.num_bytes for manifest in manifests),
                    kind=_kind(facts),
                )
            )
    return sorted(found, key=lambda row: row.name), problems


def _kind(facts: Mapping[str, Any]) -> str:
    if "needs" not in facts:
        return "session"
    members, round, _ = facts.get("population", ("?", "?", None))
    return f"population, {members} members, round {round}"


def names_nearby(here: Host | None = None) -> list[str]:
    """Return the names of sessions on this machine's own disks: at once, and without torch."""
    here = here or host.detect()
    roots = [Path.cwd() / LOCAL, *_folders(here.scratch)]
    if here.name != "colab":  # there it is Drive, which may take seconds to answer
        roots.append(here.output)
    found: set[str] = set()
    for root in roots:
        with suppress(OSError):  # a disk that does not answer has nothing to offer to Tab
            found |= {path.parts[-3] for path in root.glob(f"*/*/{MANIFEST}")}
    return sorted(found)


def _places(store: str | None, here: Host, problems: list[str]) -> Iterator[Store]:
    """Give each place once, the one where sessions survive first."""
    if store is not None:
        yield find_store(store, here)
        return
    if here.name == "colab" and not here.drive_mounted:
        problems.append(
            "Google Drive is not mounted, so it was not searched. Mount it, then list again:\n"
            '  from google.colab import drive; drive.mount("/content/drive")'
        )
    else:
        yield find_store(None, here)
    local = Path.cwd() / LOCAL
    yield from (FolderStore(root) for root in [local, *_folders(here.scratch)] if root != here.output)


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.is_dir())
