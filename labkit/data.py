"""The course's data sets, each a `datasets.DatasetDict` with train, validation and test, in the schema of its twin on the Hub."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from labkit.catalog import entry
from labkit.files import DATA

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

SPLITS = ("train", "validation", "test")
HUB_VALIDATION_ROWS = 1000
INSTRUCTION_COLUMNS = ("id", "task", "source", "phrasing", "held_out", "instruction", "input", "answer")
MAY_BE_EMPTY = ("input", "held_out", "phrasing")
PREFERENCE_COLUMNS = ("id", "criterion", "source", "prompt", "chosen", "rejected", "truth")


def load_reviews() -> DatasetDict:
    """Movie reviews: `text`, `label` (0 neg, 1 pos) and, offline, `rating` (1 to 4 or 7 to 10). Twin: stanfordnlp/imdb."""
    return _load("reviews", {"rating": "int32"})


def load_news() -> DatasetDict:
    """News briefs: `text`, `label` (0 World, 1 Sports, 2 Business, 3 Sci/Tech). Twin: fancyzhx/ag_news."""
    return _load("news", {})


def load_instructions() -> DatasetDict:
    """Instructions: `instruction`, `input` (may be empty), `answer`, `task`, and `id`, `source`, `phrasing`, `held_out`, all of them text.

    Twin: databricks/databricks-dolly-15k, whose answers are free texts, written by people, that no exact match can score. It comes in one
    piece: validation and test are taken from it, the same rows every time; held_out and phrasing are empty there.
    """
    source = entry("instructions")
    if source.folder is None:
        return _instructions_from_hub(source.repo)
    return _load_texts(source.folder, INSTRUCTION_COLUMNS, check_instructions)


def load_preferences() -> DatasetDict:
    """Preference pairs: `prompt`, `chosen`, `rejected`, and `id`, `criterion`, `source`, `truth` (JSON for `preference_judge`), all of them text.

    The same files in both profiles: preference sets on the Hub say which side people liked better, and nothing that a rule could judge a new
    completion by.
    """
    return _load_texts(entry("preferences").folder, PREFERENCE_COLUMNS, check_preferences)


def _load_texts(folder: str, columns: tuple[str, ...], check: Callable[[Path], int]) -> DatasetDict:
    """The three checked files of a folder of data/, whose columns are all texts."""
    from datasets import Features, Value, load_dataset

    paths = {split: DATA / folder / f"{split}.jsonl" for split in SPLITS}
    for path in paths.values():
        check(path)
    features = Features({column: Value("string") for column in columns})
    return load_dataset("json", data_files={split: str(path) for split, path in paths.items()}, features=features)


def check_preferences(path: Path) -> int:
    """Check every line of a file of pairs: an object with PREFERENCE_COLUMNS, all of them texts, two different sides; ids differ.

    Returns the number of rows. Raises FileNotFoundError, or ValueError naming file, line, value and remedy.
    """

    def sides(row: dict) -> str:
        return f"chosen and rejected are both {row['chosen']!r}; remove the pair" if row["chosen"] == row["rejected"] else ""

    return _check_texts(path, PREFERENCE_COLUMNS, (), sides)


def check_instructions(path: Path) -> int:
    """Check every line of an instruction file: an object with INSTRUCTION_COLUMNS, all texts, of which MAY_BE_EMPTY may be empty; ids differ.

    Returns the number of rows. Raises FileNotFoundError, or ValueError naming file, line, value and remedy.
    """
    return _check_texts(path, INSTRUCTION_COLUMNS, MAY_BE_EMPTY)


def _check_texts(path: Path, columns: tuple[str, ...], may_be_empty: tuple[str, ...], fault: Callable[[dict], str] = lambda row: "") -> int:
    """Check rows whose columns are all texts, with ids that differ. fault: what else is wrong with a row, in words, or ""."""
    name = f"{path.parent.name}/{path.name}"
    if not path.is_file():
        raise FileNotFoundError(f"{name} is not there: `python -m labkit doctor` lists what is missing")
    seen: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        where = f"{name}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error.msg}); write one object a line") from error
        if not isinstance(row, dict) or set(row) != set(columns):
            found = sorted(row) if isinstance(row, dict) else f"a {type(row).__name__}"
            raise ValueError(f"{where}: has {found}; give it exactly {', '.join(columns)}")
        for column, value in row.items():
            if not isinstance(value, str) or not (value.strip() or column in may_be_empty):
                raise ValueError(f"{where}: {column} is {value!r}; give the row a text there or remove it")
        if row["id"] in seen:
            raise ValueError(f"{where}: id {row['id']!r} is that of line {seen[row['id']]} too; remove one of them")
        if fault(row):
            raise ValueError(f"{where}: {fault(row)}")
        seen[row["id"]] = number
    if not seen:
        raise ValueError(f"{name} is empty: restore it from the repository")
    return len(seen)


def load_pretraining_text(train: int, test: int, *, seed: int = 0) -> DatasetDict:
    """Documents to pretrain on, so many of each split: `text`, and `bits`, the entropy in bits of the choices that made it (0 if unknown).

    Offline they are stories of StoryWorld, drawn from `seed`, and those of test tell combinations that train never tells. On the Hub
    they are Wikipedia's articles, always the same; there may be fewer than asked for.
    """
    from datasets import Dataset, DatasetDict

    source, wanted = entry("pretraining_text"), {"train": train, "test": test}
    if source.repo is None:
        from labkit.storyworld import stories

        told = {split: stories(count, seed=seed, split=split) for split, count in wanted.items()}
        rows = {split: {"text": [story.text for story in one], "bits": [story.bits for story in one]} for split, one in told.items()}
    else:
        from datasets import load_dataset

        loaded = load_dataset(source.repo, source.config)
        texts = {split: join_articles(loaded[split]["text"], count) for split, count in wanted.items()}
        rows = {split: {"text": one, "bits": [0.0] * len(one)} for split, one in texts.items()}
    return DatasetDict({split: Dataset.from_dict(columns) for split, columns in rows.items()})


def join_articles(lines: Iterable[str], count: int) -> list[str]:
    """The first `count` articles of WikiText, whose rows are lines. A line ` = Title = ` begins an article; ` = = Section = = ` does not."""
    articles: list[list[str]] = []
    for line in lines:
        if re.fullmatch(r" = [^=].*[^=] = \n?", line):
            if len(articles) == count:
                break
            articles.append([])
        if articles and line.strip():
            articles[-1].append(line.strip())
    return ["\n".join(article) for article in articles]


def load_folder(folder: Path, labels: tuple[str, ...], extra: dict[str, str] | None = None) -> DatasetDict:
    """Load train.jsonl, validation.jsonl and test.jsonl of `folder` through `datasets.load_dataset`, after checking every row.

    labels: class names in the order of their ids. extra: further fields and their `datasets.Value` types.
    Raises FileNotFoundError for a missing split, and ValueError naming file and line for a row that does not fit.
    """
    from datasets import ClassLabel, Features, Value, load_dataset

    paths = {split: folder / f"{split}.jsonl" for split in SPLITS}
    for path in paths.values():
        check_rows(path, labels)
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(labels))} | {k: Value(v) for k, v in (extra or {}).items()})
    return load_dataset("json", data_files={split: str(path) for split, path in paths.items()}, features=features)


def check_rows(path: Path, labels: tuple[str, ...]) -> int:
    """Check every line of a JSON Lines file: an object with a non-empty `text`, a `label` that names a class, a `rating` that agrees.

    Returns the number of rows. Raises ValueError naming file, line, value and remedy.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent.name}/{path.name} is not there: `python -m labkit doctor` lists what is missing")
    count = 0
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path.parent.name}/{path.name}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error.msg}); write one object a line") from error
            if not isinstance(row, dict):
                raise ValueError(f'{where}: a {type(row).__name__}, not an object; write {{"text": ..., "label": ...}}')
            text, label, rating = row.get("text"), row.get("label"), row.get("rating")
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{where}: text is {text!r}; give the row a text or remove it")
            if type(label) is not int or not 0 <= label < len(labels):
                raise ValueError(f"{where}: label is {label!r}; use 0 to {len(labels) - 1} ({', '.join(labels)})")
            if rating is not None and (rating not in range(1, 11) or rating in (5, 6) or (rating > 6) != bool(label)):
                raise ValueError(f"{where}: rating {rating!r} does not fit label {label} ({labels[label]}); 1 to 4 are neg, 7 to 10 pos")
            count += 1
    if count == 0:
        raise ValueError(f"{path.parent.name}/{path.name} is empty: restore it from the repository")
    return count


def subset(rows: Dataset, count: int, seed: int) -> Dataset:
    """`count` rows with the classes in equal parts (as near as it goes), drawn from the seed. A smaller draw is inside a larger one.

    Raises ValueError when there are not enough rows of a class.
    """
    import random

    by_label: dict[int, list[int]] = {}
    for index, label in enumerate(rows["label"]):
        by_label.setdefault(label, []).append(index)
    classes = sorted(by_label)
    rng = random.Random(seed)
    for label in classes:
        rng.shuffle(by_label[label])
    chosen = []
    for i in range(count):
        label = classes[i % len(classes)]
        if not by_label[label]:
            raise ValueError(f"{count} rows asked for, but class {label} has too few: ask for at most {i} of these {len(rows)} rows")
        chosen.append(by_label[label].pop())
    return rows.select(chosen)


def _load(role: str, extra: dict[str, str]) -> DatasetDict:
    source = entry(role)
    if source.folder is not None:
        return load_folder(DATA / source.folder, source.labels, extra)
    return _from_hub(source.repo, source.labels)


def _from_hub(repo: str, labels: tuple[str, ...]) -> DatasetDict:
    """A Hub data set with the course's three splits: validation rows are taken from train, the same ones every time."""
    from datasets import ClassLabel, DatasetDict, load_dataset

    loaded = load_dataset(repo)
    label = loaded["train"].features.get("label")
    if not isinstance(label, ClassLabel) or tuple(label.names) != labels:
        raise ValueError(f"{repo} has labels {getattr(label, 'names', label)}, the course expects {list(labels)}: pin an older revision")
    bad = [i for split in ("train", "test") for i, value in enumerate(loaded[split]["label"]) if value < 0]
    if bad:
        raise ValueError(f"{repo}: row {bad[0]} has label -1, an unlabelled row in a labelled split: filter it out first")
    held_out = min(HUB_VALIDATION_ROWS, len(loaded["train"]) // 5)
    parts = loaded["train"].train_test_split(test_size=held_out, seed=0, stratify_by_column="label")
    return DatasetDict(train=parts["train"], validation=parts["test"], test=loaded["test"])


def _instructions_from_hub(repo: str) -> DatasetDict:
    """Dolly's columns under the course's names; rows without an instruction or an answer are left out."""
    from datasets import DatasetDict, load_dataset

    rows = load_dataset(repo)["train"]
    wanted = {"instruction", "context", "response", "category"}
    if not wanted <= set(rows.column_names):
        raise ValueError(f"{repo} has the columns {rows.column_names}, the course expects {sorted(wanted)}: pin an older revision")

    def renamed(row: dict, index: int) -> dict[str, str]:
        new = {"id": str(index), "task": row["category"], "source": repo, "phrasing": "", "held_out": ""}
        return new | {"instruction": row["instruction"], "input": row["context"] or "", "answer": row["response"]}

    rows = rows.map(renamed, with_indices=True, remove_columns=rows.column_names)
    rows = rows.filter(lambda row: row["instruction"].strip() and row["answer"].strip())
    held_out = min(HUB_VALIDATION_ROWS, len(rows) // 10)
    rest = rows.train_test_split(test_size=2 * held_out, seed=0)
    parts = rest["test"].train_test_split(test_size=held_out, seed=0)
    return DatasetDict(train=rest["train"], validation=parts["train"], test=parts["test"])


def fingerprint(rows: Dataset) -> str:
    """A short hash of the texts and labels, in order: two runs with the same fingerprint saw the same rows."""
    digest = hashlib.sha256()
    for text, label in zip(rows["text"], rows["label"], strict=True):
        digest.update(f"{label}\t{text}\n".encode())
    return digest.hexdigest()[:12]
