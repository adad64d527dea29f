"""What lies in a folder: its files in one quick pass, its splits, and which paths stay inside."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from vision_jax.errors import UserError

_SPLIT = re.compile(
    r"(?:^|[^a-z])(train|training|trn|val|valid|validation|dev|test|testing|eval|evaluation)"
    r"(?:set|data)?(?:$|[^a-z])"
)
_LITTER = frozenset({"__MACOSX", "@eaDir"})  # unpacked beside images by macOS, written by a NAS
MOST_PARTS = 16  # of a path that was written elsewhere: by so many of its last parts it is sought


def list_files(
    folder: str | Path, suffixes: Iterable[str], *, follow_links: bool = False
) -> tuple[list[str], int]:
    """(regular files at any depth with one of the suffixes, how many other files there are).

    Paths are relative to `folder`, with `/`, in the order of their parts. Hidden files count as
    others, and what hidden folders hold is not looked at. The directory itself tells what is a
    file, so only links cost a system call each. With `follow_links` linked folders are entered,
    each once and none that leads back up.

    Raises UserError if a folder can't be read.
    """
    wanted, others = tuple(suffixes), 0
    found: list[str] = []
    entered = {os.path.realpath(folder)}
    top = next(iter(entered)) + os.sep
    todo = [("", True)]  # paths, the next one last, and whether it is a folder
    while todo:
        inside, is_folder = todo.pop()
        if not is_folder:
            found.append(inside)
            continue
        names: list[str] = []
        folders: list[str] = []
        try:
            with os.scandir(os.path.join(folder, inside)) as entries:
                for entry in entries:
                    name = entry.name
                    if name[0] == "." or name in _LITTER:
                        others += 1
                    elif name.lower().endswith(wanted) and entry.is_file():
                        names.append(name)
                    elif not entry.is_dir():
                        others += 1
                    elif not entry.is_symlink():
                        folders.append(name)
                    elif follow_links:
                        real = os.path.realpath(entry.path)
                        if real not in entered and not top.startswith(real.rstrip(os.sep) + os.sep):
                            entered.add(real)
                            folders.append(name)
        except OSError as error:
            raise UserError(f"{os.path.join(folder, inside)}: {_reason(error)}") from error
        if folders:
            here = sorted([*((n, False) for n in names), *((n, True) for n in folders)])
            todo += [(inside + name + "/" * deeper, deeper) for name, deeper in reversed(here)]
        else:
            found += [inside + name for name in sorted(names)]
    return found, others


def list_folders(folder: str | Path) -> tuple[list[str], int]:
    """(names of the folders in a folder, sorted, links among them, none hidden; number of files).

    Raises UserError if it can't be read.
    """
    try:
        with os.scandir(folder) as entries:
            kinds = {entry.name: entry.is_dir() for entry in entries}
    except OSError as error:
        raise UserError(f"{folder}: {_reason(error)}") from error
    names = [n for n, is_dir in kinds.items() if is_dir and n[0] != "." and n not in _LITTER]
    return sorted(names), sum(not is_dir for is_dir in kinds.values())


def _reason(error: OSError) -> str:
    return f"can't be read ({error.strerror})"


# --- splits -------------------------------------------------------------------------------------


def splits_among(names: Iterable[str]) -> list[str]:
    """Those that are named as splits are (train, Val, test_set, train2017, ...), training first."""
    found = [name for name in names if _SPLIT.search(name.lower())]
    return sorted(found, key=lambda name: (re.search("trn|train", name.lower()) is None, name))


def splits_of(paths: Iterable[str]) -> list[str]:
    """The folders that files lie in, if there are several and each is named as a split."""
    tops = {path.partition("/")[0] if "/" in path else "" for path in paths}
    splits = splits_among(tops)
    return splits if len(splits) == len(tops) > 1 else []


def refuse_splits(folder: Path, paths_of: Mapping[str, Sequence[str]]) -> None:
    """Raises UserError, which names the right folder, where class folders lie one level deeper.

    `paths_of`: of each folder in `folder` the images, relative to it. Splits are told from classes
    of such names by holding folders. A single folder of folders is what unpacking often leaves.
    """
    held = {name: paths for name, paths in paths_of.items() if paths}
    nested = [name for name, paths in held.items() if all("/" in path for path in paths)]
    splits = splits_among(paths_of)
    if len(splits) > 1 and set(splits) & set(nested):
        exact = sum(re.fullmatch("[a-z]+", name.lower()) is not None for name in splits) > 1
        if exact or set(held) <= set(splits):
            train, *others = (folder / name for name in splits)
            raise UserError(
                f"{folder}: {_listed(splits)} are splits and no classes: use {train} for training"
                f" and {_listed(map(str, others), 'or')} for evaluation"
            )
    if len(held) == 1 and nested:
        (name,) = nested
        below: dict[str, list[str]] = {}
        for path in held[name]:
            top, _, rest = path.partition("/")
            below.setdefault(top, []).append(rest)
        if name in splits or (len(paths_of) == 1 and len(below) > 1):
            refuse_splits(folder / name, below)
            raise UserError(
                f"{folder}: the only folder with images in it is {name}, which holds folders"
                f" itself: use {folder / name}"
            )


def _listed(names: Iterable[str], word: str = "and") -> str:
    *first, last = names
    return f"{', '.join(first)} {word} {last}" if first else last


# --- paths that files state ---------------------------------------------------------------------

Verdict = Literal["found", "missing", "outside", "elsewhere"]


class Inside:
    """Finds files by stated paths inside one folder; each of its folders is listed once."""

    def __init__(self, folder: Path):
        self.folder, self._root = folder, os.path.realpath(folder)
        self._starts = {
            os.path.join(start, "") for start in (self._root, os.path.abspath(folder), str(folder))
        }
        self._listings: dict[str, dict[str, bool] | None] = {}  # name -> whether it is a link

    def locate(self, path: str, *, by_end: bool = False) -> tuple[str, Verdict]:
        """(the path relative to the folder, "found"), or (`path`, what is the matter).

        What was written on another machine is read as it can only be meant, and never leads out:
        an absolute path by as many of its last parts as there are inside; `..` where the path comes
        back into the folder; Windows' separators as such; and a path that begins with the folder's
        own name without it. `by_end` treats relative paths like absolute ones.

        "outside": links lead out of the folder. "elsewhere": it is absolute or has `..`, and means
        nothing inside. "missing": there is no such file.
        """
        leaves = leaves_its_folder(path)
        if not leaves:
            found = self.find(path)
            if found is not False:
                return path, "found" if found else "outside"
        for rest in self._other_readings(path, by_end):
            if rest and self.find(rest):
                return rest, "found"
        return path, "elsewhere" if leaves else "missing"

    def _other_readings(self, path: str, by_end: bool) -> Iterator[str]:
        """Paths without `..`, relative to the folder, that `path` can mean; the likeliest first."""
        for start in self._starts:
            if path.startswith(start) and not leaves_its_folder(path[len(start) :] or "."):
                yield path[len(start) :]
        path = path.replace("\\", "/")
        parts = [part for part in path.split("/") if part not in ("", ".")]
        own = Path(self._root).name
        if ".." in parts:
            if path[0] != "/":
                rest = os.path.normpath(os.path.join(own, path)).split("/")
                if rest[0] == own:
                    yield "/".join(rest[1:])
        elif by_end or leaves_its_folder(path):
            for i in range(max(len(parts) - MOST_PARTS, 0), len(parts)):
                yield "/".join(parts[i:])
        else:
            yield "/".join(parts)
            if parts[:1] == [own]:
                yield "/".join(parts[1:])

    def find(self, path: str) -> bool | None:
        """Whether there is such a file; None if the path leads out of the folder."""
        parent, _, name = path.rpartition("/")
        if parent not in self._listings:
            self._listings[parent] = self._list(os.path.join(self.folder, parent))
        listing = self._listings[parent]
        if listing is None:
            return None
        if listing.get(name):
            file = os.path.join(self.folder, path)
            return os.path.isfile(file) if self.holds(file) else None
        return name in listing

    def holds(self, path: str | Path) -> bool:
        """Whether `path` is inside after all links are followed."""
        try:
            real = os.path.realpath(path)
        except ValueError:  # a null character, half of a character
            return False
        return real == self._root or real.startswith(self._root.rstrip(os.sep) + os.sep)

    def _list(self, path: str) -> dict[str, bool] | None:
        if not self.holds(path):
            return None
        try:
            with os.scandir(path) as entries:
                return {e.name: e.is_symlink() for e in entries if e.is_symlink() or e.is_file()}
        except (OSError, ValueError):  # no such folder, a name too long, links in a circle
            return {}


def leaves_its_folder(path: str) -> bool:
    """Whether a path could lead out of its folder by its form alone, on any system."""
    if path[0] not in "/\\" and path[1:2] != ":" and ".." not in path:
        return False
    parts = re.split(r"[\\/]", path)
    return not parts[0] or ".." in parts or re.fullmatch("[A-Za-z]:", parts[0]) is not None
