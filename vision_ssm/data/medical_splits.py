"""Which cases train and which validate: drawn once, written to a file, and reused from then on.

The file is nnU-Net's ``splits_final.json``: a list with one object for each fold, ``{"train": [...], "val": [...]}``,
here with an optional ``"test"``. A file that exists is never redrawn, so results stay comparable; cases that came or
went since are an error that names them.
"""

import json
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vision_ssm.data.dense_report import listed
from vision_ssm.data.medical_volume import MedicalDataError
from vision_ssm.registry import suggest

Split = dict[str, list[str]]
SPLIT_FILE = "splits.json"


def _groups(cases: Sequence[str], group: str | None) -> dict[str, list[str]]:
    """Cases that must stay together, by name of the group."""
    if len(set(cases)) != len(cases):
        double = sorted({case for case in cases if list(cases).count(case) > 1})
        raise MedicalDataError(f"cases are named twice: {listed(double)}")
    groups: dict[str, list[str]] = {}
    for case in sorted(cases):
        match = None if group is None else re.match(group, case)
        if group is not None and match is None:
            raise MedicalDataError(f"the pattern {group!r} of groups does not fit the case {case!r}")
        groups.setdefault(case if match is None else match.group(match.lastindex or 0), []).append(case)
    return groups


def draw_split(
    cases: Sequence[str], val: float = 0.2, test: float = 0.0, seed: int = 42, group: str | None = None,
) -> Split:
    """Divide cases at random.

    Args:
        cases: Names.
        val: Fraction of the groups that validate, at least one.
        test: Fraction of the groups that test; 0: none.
        seed: Of `numpy.random.RandomState`, whose stream never changes between numpy versions.
        group: Regular expression from the start of a name; cases that agree in it (or in its first group) stay
            together, such as ``(case\\d+)`` for slices of one patient. None: every case for itself.

    Returns:
        dict with ``train``, ``val`` and, if asked for, ``test``: sorted names.

    Raises:
        MedicalDataError: A case named twice, a pattern that does not fit, or too few cases.
        ValueError: Fractions that leave nothing to train on.
    """
    if not (0 < val < 1 and 0 <= test < 1 and val + test < 1):
        raise ValueError(f"val and test are fractions with a sum below 1, got {val!r} and {test!r}")
    groups = _groups(cases, group)
    counts = dict(val=max(1, round(val * len(groups))), test=max(1, round(test * len(groups))) if test else 0)
    if sum(counts.values()) >= len(groups):
        raise MedicalDataError(
            f"{len(groups)} cases (or groups of cases) are too few for {counts['val']} to validate, {counts['test']} to"
            " test and some to train"
        )
    names = np.random.RandomState(seed).permutation(sorted(groups)).tolist()
    parts = {"val": names[: counts["val"]], "test": names[counts["val"]: sum(counts.values())]}
    parts["train"] = names[sum(counts.values()):]
    return {
        part: sorted(case for name in parts[part] for case in groups[name])
        for part in ("train", "val", "test") if parts[part]
    }  # fmt: skip


def draw_folds(cases: Sequence[str], folds: int = 5, seed: int = 42, group: str | None = None) -> list[Split]:
    """Divide cases for cross-validation: every case validates in exactly one fold. Arguments as in `draw_split`.

    Raises:
        MedicalDataError: Fewer cases (or groups) than folds.
        ValueError: Fewer than two folds.
    """
    if folds < 2:
        raise ValueError(f"cross-validation needs at least 2 folds, got {folds!r}")
    groups = _groups(cases, group)
    if len(groups) < folds:
        raise MedicalDataError(f"{len(groups)} cases (or groups of cases) cannot be divided into {folds} folds")
    names = np.random.RandomState(seed).permutation(sorted(groups)).tolist()
    result = []
    for fold in range(folds):
        chosen = set(names[fold::folds])
        result.append({
            "train": sorted(case for name in names if name not in chosen for case in groups[name]),
            "val": sorted(case for name in chosen for case in groups[name]),
        })
    return result


def read_splits(path: str | os.PathLike) -> list[Split]:
    """Folds of a split file.

    Raises:
        MedicalDataError: No such file, not of the stated form, or a case in two parts of one fold.
    """
    path = Path(path)
    try:
        folds = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise MedicalDataError(f"cannot read the split file {str(path)!r}: {error}") from error
    good = isinstance(folds, list) and folds and all(
        isinstance(fold, dict) and "train" in fold and "val" in fold and set(fold) <= {"train", "val", "test"}
        and all(isinstance(part, list) and all(isinstance(case, str) for case in part) for part in fold.values())
        for fold in folds
    )  # fmt: skip
    if not good:
        raise MedicalDataError(
            f'{str(path)!r} is no split file: expected a list of {{"train": [names], "val": [names]}}, one a fold'
        )
    for number, fold in enumerate(folds):
        seen: dict[str, str] = {}
        for part, cases in fold.items():
            for case in cases:
                if case in seen:
                    raise MedicalDataError(
                        f"{str(path)!r}, fold {number}: case {case!r} is in {seen[case]!r} and in {part!r}"
                    )
                seen[case] = part
    return folds


def write_splits(path: str | os.PathLike, folds: Sequence[Split]) -> None:
    """Write a split file; it appears complete or not at all, and one that another process wrote first is kept.

    Raises:
        MedicalDataError: It cannot be written.
    """
    path = Path(path)
    text = json.dumps(list(folds), indent=1) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.chmod(file.name, 0o644)
            try:
                os.link(file.name, path)
            except FileExistsError:
                pass
    except OSError as error:
        raise MedicalDataError(
            f"cannot write the split file {str(path)!r}: {error.strerror or error}. Name one that can be written with"
            " split_file=."
        ) from error


def fixed_split(
    path: str | os.PathLike,
    cases: Sequence[str],
    split: str,
    *,
    fold: int = 0,
    folds: int | None = None,
    val: float = 0.2,
    test: float = 0.0,
    seed: int = 42,
    group: str | None = None,
) -> list[str]:
    """Cases of one part, from the split file `path`, which is drawn and written if it does not exist.

    Args:
        path: Split file.
        cases: All cases that there are.
        split: ``train``, ``val``, ``test``, or ``all``, which needs no file.
        fold: Which fold of the file.
        folds: Draw this many folds for cross-validation; None: one division by `val` and `test`.
        val, test, seed, group: See `draw_split`. They count when the file is drawn; afterwards the file does.

    Raises:
        MedicalDataError: See `read_splits`; no such part or fold; the file names cases that do not exist, or there are
            cases that it does not name.
    """
    if split == "all":
        return sorted(cases)
    if not Path(path).is_file():
        drawn = [draw_split(cases, val, test, seed, group)] if folds is None else draw_folds(cases, folds, seed, group)
        write_splits(path, drawn)
    found = read_splits(path)
    name = repr(str(path))
    if not 0 <= fold < len(found) or (folds is not None and folds != len(found)):
        asked = f"fold {fold}" + (f" of {folds}" if folds is not None else "")
        raise MedicalDataError(f"{name} has {len(found)} folds, counted from 0; {asked} was asked for")
    chosen = found[fold]
    if split not in chosen:
        raise MedicalDataError(f"{name} has no part {split!r}.{suggest(split, chosen)}")
    named = {case for part in chosen.values() for case in part}
    absent, new = sorted(named - set(cases)), sorted(set(cases) - named)
    if absent or new:
        facts = [f"names {len(absent)} cases that are not there: {listed(absent)}"] if absent else []
        facts += [f"does not name {len(new)} cases that are there: {listed(new)}"] if new else []
        raise MedicalDataError(
            f"{name} {' and '.join(facts)}. Restore the data, or remove the file to draw a new split, whose results"
            " cannot be compared with earlier ones."
        )
    return list(chosen[split])
