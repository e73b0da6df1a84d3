"""Folders of images: root/SPLIT/CLASS/*, listed and checked."""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from okddip.errors import ConfigError, raise_problems
from okddip.text import composed, for_terminal, is_byte

log = logging.getLogger(__name__)

# Of Windows, macOS, Synology and ext4, in folders and in archives that were made there; in lower case
LEFTOVERS = {
    *("__macosx", "icon\r", "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini"),
    *("$recycle.bin", "system volume information", "@eadir", "lost+found"),
}
MOST_KINDS = 5  # of what is ignored, that the message names


class Listing(NamedTuple):
    """The files of a folder, sorted by split, class and name."""

    classes: tuple[str, ...]
    files: dict[str, list[str]]  # paths of each split
    labels: dict[str, np.ndarray]  # int64 [N] of each split
    fingerprint: str  # of all names, sizes and times of change


def scan(root: Path, splits: Sequence[str]) -> Listing:
    """List root/SPLIT/CLASS/*, following links and ignoring what is hidden or in `LEFTOVERS`.

    A class is the name of its folder in Unicode's composed form (NFC), since file systems and archives
    encode the same name in several ways.

    Raises:
        ConfigError: names all folders that are missing, unreadable or empty, all classes that are in one
            split only or have two folders in one, and what else lies where only folders or images belong.
    """
    if not root.is_dir():
        raise ConfigError(f"dataset.root={root}: there is no such folder.")
    entries = _Entries()
    folders = {split: _class_folders(root / split, entries) for split in splits}
    entries.problems += _absent_classes(root, folders)
    classes = tuple(sorted(set().union(*folders.values())))

    digest = hashlib.sha256()
    files: dict[str, list[str]] = {split: [] for split in splits}
    labels: dict[str, np.ndarray] = {}
    for split in splits:
        counts = []
        for name in classes:
            found = entries.images(folders[split][name]) if name in folders[split] else []
            for entry, stamp in found:
                digest.update(os.fsencode(f"{split}/{name}/{entry.name}") + stamp)
            files[split].extend(entry.path for entry, _ in found)
            counts.append(len(found))
        labels[split] = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    raise_problems(f"dataset.root={root}", entries.problems)
    if entries.ignored:
        log.info(
            "%s: ignored %s hidden files and folders, or such as systems and archives leave (%s).",
            *(for_terminal(root), f"{sum(entries.ignored.values()):,}"),
            for_terminal(", ".join(sorted(entries.ignored)[:MOST_KINDS])),
        )
    return Listing(classes, files, labels, digest.hexdigest())


def _class_folders(folder: Path, entries: "_Entries") -> dict[str, Path]:
    """The folder of each class of a split."""
    folders: dict[str, Path] = {}
    found = entries.of(folder)
    for entry in found or []:
        try:
            is_folder = entry.is_dir()
        except OSError as error:  # a link in a circle
            entries.problems.append(f"{for_terminal(entry.path)}: cannot be read ({error.strerror}).")
            continue
        [name] = composed([entry.name])
        if not is_folder:
            entries.problems.append(
                f"{for_terminal(entry.path)}: is not a folder; images belong into {folder}/CLASS/."
            )
        elif any(map(is_byte, entry.name)):  # reports and exported networks could not name it
            bytes_ = ascii(os.fsencode(entry.name))
            entries.problems.append(f"{folder}: the class {bytes_} has a name that is not UTF-8; rename it.")
        elif name in folders:
            entries.problems.append(
                f"{folder}: two folders are called {for_terminal(name)}, in two encodings of"
                " the same letters (Unicode's NFC and NFD). Move their images into one."
            )
        else:
            folders[name] = folder / entry.name
    if found == []:
        entries.problems.append(f"{folder}: is empty; expected {folder}/CLASS/* with images.")
    return folders


def _absent_classes(root: Path, folders: dict[str, dict[str, Path]]) -> list[str]:
    """A sentence for each class that has no folder in one of the splits that have any."""
    every = sorted(set().union(*folders.values()))
    return [
        f"{root}: class '{for_terminal(name)}' has no folder in {root / split}; each class must be in each"
        " split."
        for split, present in folders.items()
        for name in every
        if present and name not in present
    ]


class _Entries:
    """Lists folders, collects what is wrong there, and counts what is ignored."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.ignored: Counter[str] = Counter()  # by name

    def of(self, folder: Path) -> list[os.DirEntry[str]] | None:
        """What lies in a folder; None if it cannot be listed."""
        try:
            with os.scandir(folder) as entries:
                found = list(entries)
        except OSError as error:
            place = for_terminal(folder)
            missing = isinstance(error, FileNotFoundError)
            expected = f"; expected {place}/CLASS/* with images" if missing else ""
            self.problems.append(f"{place}: cannot be listed ({error.strerror}){expected}.")
            return None
        leftovers = [entry.name for entry in found if is_leftover(entry.name)]
        if not leftovers:
            return found
        self.ignored.update(leftovers)
        return [entry for entry in found if not is_leftover(entry.name)]

    def images(self, folder: Path) -> list[tuple[os.DirEntry[str], bytes]]:
        """The files in the folder of a class by name, each with its size and time of change."""
        found = self.of(folder)
        if found == []:
            self.problems.append(
                f"{for_terminal(folder)}: is empty; every class needs an image in every split."
            )
        stamped = []
        for entry in sorted(found or [], key=lambda entry: entry.name):
            try:
                stat, is_file = entry.stat(), entry.is_file()
            except OSError as error:
                self.problems.append(f"{for_terminal(entry.path)}: cannot be read ({error.strerror}).")
                continue
            if is_file:
                stamped.append((entry, f"\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode()))
            else:
                path = for_terminal(entry.path)
                self.problems.append(f"{path}: is not a file; images belong into the folder of their class.")
        return stamped


def is_leftover(name: str) -> bool:
    """Whether a file or folder is hidden, or one that a system or an archive leaves among others."""
    return name.startswith(".") or name.casefold() in LEFTOVERS
