"""Every reader on nonsense: changed small data sets give tables or a DisclError, nothing else.

A thousand seeded changes: of bytes, JSON, cells, columns, members of tars, and files that are
folders, pipes or links.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import shutil
import signal
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from discl.data import inspect_images, read_tables
from discl.data.readers import READERS
from discl.errors import DisclError
from discl.stages.init import write_starter
from helpers import miniatures

TOTAL = 1_000
SECONDS = 5
SECRET = (201, 3, 77)
"""The colour of the picture outside of every root, which no reader may show."""


def encoded(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 7, 9)).save(stream, "PNG")
    return stream.getvalue()


# ---------------------------------------------------------------- small valid data sets


def images(root: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(number))


def imagefolder(root: Path) -> None:
    images(root, *(f"{split}/{name}/1.png" for split in ("train", "test") for name in "ab"))


def metadata(root: Path) -> None:
    for number, split in enumerate(("train", "test")):
        images(root / split, "1.png", "2.png")
        if number:
            lines = ('{"file_name": "1.png", "label": 1}', '{"file_name": "2.png", "label": 20}')
            (root / split / "metadata.jsonl").write_text("\n".join(lines) + "\n")
        else:
            (root / split / "metadata.csv").write_text("file_name,label\n1.png,1\n2.png,20\n")


def roboflow(root: Path) -> None:
    for split in ("train", "valid"):
        images(root / split, "1.png", "2.png")
        (root / split / "_classes.csv").write_text("filename, a, b\n1.png, 1, 0\n2.png, 0, 1\n")


def rows() -> tuple[dict[str, list[Any]], Features]:
    values = {
        "image": [{"bytes": encoded(number), "path": None} for number in range(3)],
        "label": [0, 1, 0],
        "id": ["x", "y", "z"],
        "group": ["g", "g", "h"],
    }
    kinds = {"label": ClassLabel(names=["a", "b"]), "id": Value("string"), "group": Value("string")}
    return values, Features({"image": ImageFeature(), **kinds})


def parquet(root: Path) -> None:
    for split in ("train", "test"):
        Dataset.from_dict(*rows()).to_parquet(str(root / f"{split}-00000-of-00001.parquet"))


def saved(root: Path) -> None:
    both = DatasetDict({split: Dataset.from_dict(*rows()) for split in ("train", "test")})
    both.save_to_disk(str(root))


def manifest(root: Path) -> None:
    images(root, "1.png", "sub/2.png", "3.png")
    (root / "list.csv").write_text(
        "path,label,split,group\n1.png,cat,train,g\nsub/2.png,dog,train,h\n3.png,cat,test,\n"
    )


def webdataset(root: Path) -> None:
    for split in ("train", "test"):
        members = [("a.png", encoded(1)), ("a.cls", b"3"), ("b.png", encoded(2))]
        pack(root / f"{split}-0.tar", [*members, ("b.json", b'{"label": 5, "group": "g"}')])


def coco(root: Path) -> None:
    images(root, "train/1.png", "train/2.png")
    content = {
        "categories": [{"id": 1, "name": "owl"}, {"id": 2, "name": "tit"}],
        "images": [{"id": n, "file_name": f"{n}.png"} for n in (1, 2)],
        "annotations": [{"id": n, "image_id": n, "category_id": n} for n in (1, 2)],
    }
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_train.json").write_text(json.dumps(content))


def hub(root: Path) -> None:
    """Nothing lies there: what the hub gives is made in `read`."""


MAKERS: dict[str, Callable[[Path], Any]] = {
    "imagefolder": imagefolder,
    "metadata": metadata,
    "roboflow": roboflow,
    "parquet": parquet,
    "hub": hub,
    "datasets": saved,
    "manifest": manifest,
    "imagenet-lt": miniatures.imagenet_lt,
    "cifar": lambda root: miniatures.cifar100(root, ["a", "b"], [3, 2]),
    "inaturalist": miniatures.inaturalist2018,
    "wilds": miniatures.iwildcam,
    "webdataset": webdataset,
    "coco": coco,
}


def pack(file: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(file, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


# ---------------------------------------------------------------- changes

NUMBERS: list[Any] = [-1, 0, 2, 1.5, 1e308, float("nan"), 4_000_000_000, 2**63, -(2**70), 10**400]
VALUES: list[Any] = [None, True, "", " ", "\0", "7", "x" * 300, "é\u202e", [], [1], {}, {"a": [1]}]
ESCAPES = [
    "../secret/s.png",
    "{secret}/s.png",
    "a/../../secret/s.png",
    "..\\secret\\s.png",
    "~/s.png",
]
ADDRESSES = ["slice://0:99::{secret}/s.png", "https://x.org/s.png", "/dev/zero", "/proc/self/mem"]


class Change:
    """One seeded change of a copy of a data set."""

    def __init__(self, seed: str, secret: Path) -> None:
        self.random, self.secret = random.Random(seed), secret

    def value(self) -> Any:
        kind = self.random.choice((NUMBERS, VALUES, ESCAPES, ADDRESSES))
        found = self.random.choice(kind)
        return found.replace("{secret}", str(self.secret)) if isinstance(found, str) else found

    def apply(self, root: Path) -> None:
        files = sorted(each for each in root.rglob("*") if each.is_file())
        lists = [each for each in files if each.suffix not in {".png", ".jpg", ".JPEG"}]
        file = self.random.choice(lists if lists and self.random.random() < 0.85 else files)
        kinds: dict[str, Callable[[Path], None]] = {
            ".json": self.json,
            ".jsonl": self.lines,
            ".txt": self.lines,
            ".csv": self.csv,
            ".parquet": self.parquet,
            ".tar": self.tar,
        }
        chance = self.random.random()
        if file.suffix in kinds and chance < 0.6:
            kinds[file.suffix](file)
        elif chance < 0.85:
            self.bytes(file)
        else:
            self.place(file)

    def bytes(self, file: Path) -> None:
        data = bytearray(file.read_bytes())
        at, size = self.random.randrange(len(data) + 1), self.random.randrange(1, 40)
        what = self.random.randrange(6)
        if what == 0:
            del data[at:]
        elif what == 1:
            del data[at : at + size]
        elif what == 2:
            data[at:at] = self.random.randbytes(size)
        elif what == 3:
            data[at:at] = data[at : at + size] * 50
        elif what == 4:
            data[at:at] = self.random.choice(
                (b"[" * 100_000, b"\0" * 600, b"\xff\xfe", b'"', b"\n")
            )
        else:
            for _ in range(self.random.randrange(1, 9)):
                data[self.random.randrange(len(data))] = self.random.randrange(256)
        file.write_bytes(bytes(data))

    def place(self, file: Path) -> None:
        """Something else where the file was."""
        file.unlink()
        what = self.random.randrange(7)
        if what == 0:
            file.mkdir()
        elif what == 1:
            os.mkfifo(file)
        elif what == 2:
            file.symlink_to(self.secret / "s.png")
        elif what == 3:
            file.symlink_to(file)
        elif what == 4:
            file.write_bytes(b"")
        elif what == 5:
            file.symlink_to(self.secret / "list.csv")

    def json(self, file: Path) -> None:
        content = json.loads(file.read_text())
        deep = self.random.random() < 0.05
        self.change(content)
        text = json.dumps(content)
        file.write_text("[" * 50_000 + text if deep else text)

    def change(self, content: Any) -> None:
        """A value anywhere in a tree, a key, or an element is replaced, deleted or doubled."""
        places = list(_places(content))
        if not places:
            return
        inside, key = self.random.choice(places)
        what = self.random.random()
        if what < 0.6:
            inside[key] = self.value()
        elif what < 0.8:
            del inside[key]
        elif isinstance(inside, list):
            inside.append(inside[key])
        else:
            inside[str(self.value())[:40]] = inside.pop(key)

    def lines(self, file: Path) -> None:
        lines = file.read_text().splitlines()
        at = self.random.randrange(len(lines))
        words = lines[at].split(" ")
        words[self.random.randrange(len(words))] = str(self.value())
        if file.suffix == ".jsonl":
            content = json.loads(lines[at])
            self.change(content)
            words = [json.dumps(content)]
        lines[at : at + 1] = [" ".join(words)] * self.random.choice((1, 1, 2))
        self.encode(file, "\n".join(lines))

    def csv(self, file: Path) -> None:
        table = list(csv.reader(file.read_text().splitlines()))
        row = self.random.choice(table)
        what = self.random.random()
        if what < 0.6:
            row[self.random.randrange(len(row))] = str(self.value())
        elif what < 0.7:
            row.append(row[0])
        elif what < 0.8:
            del row[self.random.randrange(len(row))]
        else:
            column = self.random.randrange(len(table[0]))
            for each in table:
                each.append(each[min(column, len(each) - 1)])
        stream = io.StringIO()
        csv.writer(stream, delimiter=self.random.choice(",,,;\t|")).writerows(table)
        self.encode(file, stream.getvalue())

    def encode(self, file: Path, text: str) -> None:
        encoding = self.random.choice(("utf-8", "utf-8", "utf-8", "utf-16", "latin-1", "utf-8-sig"))
        file.write_bytes(text.encode(encoding, "replace"))

    def column(self, rows: int) -> pa.Array:
        kinds: list[Callable[[], pa.Array]] = [
            lambda: pa.nulls(rows),
            lambda: pa.array([[1]] * rows),
            lambda: pa.array([{"path": self.secret.as_posix() + "/s.png", "bytes": None}] * rows),
            lambda: pa.array([{"x": 1}] * rows),
            lambda: pa.array([True] * rows),
            lambda: pa.array([0.5] * rows),
            lambda: pa.array([-1] * rows),
            lambda: pa.array([4_000_000_000] * rows),
            lambda: pa.array([b"\xff"] * rows),
            lambda: pa.array(["../secret/s.png"] * rows).dictionary_encode(),
            lambda: pa.array([None, *["a"] * (rows - 1)], pa.string()),
            lambda: pa.array([f"{self.secret}/s.png"] * rows),
            lambda: pa.array([0] * rows, pa.date32()),
            lambda: pa.array([1] * rows, pa.decimal128(20, 3)),
        ]
        return self.random.choice(kinds)()

    def table(self, table: pa.Table) -> pa.Table:
        at = self.random.randrange(table.num_columns)
        name, what = table.column_names[at], self.random.random()
        if what < 0.5:
            return table.set_column(at, name, self.column(table.num_rows)).replace_schema_metadata()
        if what < 0.6:
            return table.drop([name])
        if what < 0.7:
            return table.append_column(name, table.column(at))
        if what < 0.75:
            return table.slice(0, 0)
        stated = json.loads((table.schema.metadata or {}).get(b"huggingface", b'{"info": {}}'))
        self.change(stated)
        return table.replace_schema_metadata({"huggingface": json.dumps(stated)})

    def parquet(self, file: Path) -> None:
        pq.write_table(self.table(pq.read_table(file)), file)

    def tar(self, file: Path) -> None:
        with tarfile.open(file) as tar:
            files = [(each.name, tar.extractfile(each)) for each in tar]
            members = [(name, file.read()) for name, file in files if file is not None]
        at = self.random.randrange(len(members))
        name, data = members[at]
        what = self.random.randrange(5)
        if what == 0:
            members[at] = (
                self.random.choice(("._a.png", "a", ".", "../a.png", "a.b.png", "é.cls")),
                data,
            )
        elif what == 1:
            members[at] = (name, str(self.value()).encode("utf-8", "surrogatepass"))
        elif what == 2:
            members[at] = (
                name,
                json.dumps({"label": self.value(), "group": self.value()}).encode(),
            )
        elif what == 3:
            members.append(members[self.random.randrange(len(members))])
        else:
            del members[at]
        pack(file, members)


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in list(items):
        yield content, key
        if isinstance(value, dict | list):
            yield from _places(value)


# ---------------------------------------------------------------- the test


class Hang(BaseException):
    """No Exception, so that nothing takes it for a fault of the data."""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise Hang(f"after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


opened: list[str] = []
watching = [False]


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and watching[0] and isinstance(arguments[0], str | bytes):
        opened.append(os.fsdecode(arguments[0]))


sys.addaudithook(_watch)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    for kind, make in MAKERS.items():
        (folder / kind).mkdir()
        make(folder / kind)
    return folder


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def test_every_reader_has_a_sound_data_set(sound: Path) -> None:
    assert set(MAKERS) == set(READERS)
    for kind in set(READERS) - {"hub"}:
        tables = read_tables(str(sound / kind), kind)
        assert sum(len(table) for table in tables.values()) >= 2
        assert len(read_tables(str(sound / kind))["train"]) == len(tables["train"])


@pytest.mark.parametrize(
    "root", ["a\0b", "x" * 5_000, "/dev/zero", "/dev/null/x", "~nobody-here/x"]
)
def test_a_root_that_is_none(root: str) -> None:
    with limited(SECONDS), pytest.raises(DisclError):
        read_tables(root)


def test_a_list_of_classes_without_names_makes_none(tmp_path: Path) -> None:
    """`datasets` would make four thousand million names."""
    parquet(tmp_path)
    file = tmp_path / "train-00000-of-00001.parquet"
    table = pq.read_table(file)
    stated = json.loads(table.schema.metadata[b"huggingface"])
    stated["info"]["features"]["label"] = {"_type": "ClassLabel", "num_classes": 4_000_000_000}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(stated)}), file)
    saved(tmp_path / "saved")
    info = tmp_path / "saved" / "train" / "dataset_info.json"
    content = json.loads(info.read_text())
    content["features"]["label"] = {"_type": "ClassLabel", "num_classes": 4_000_000_000}
    info.write_text(json.dumps(content))
    for root in (tmp_path, tmp_path / "saved"):
        with limited(SECONDS), pytest.raises(DisclError, match=r"4,000,000,000 classes without"):
            read_tables(str(root))


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.slow
def test_nonsense_is_told(
    kind: str, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, secret = tmp_path / "root", tmp_path / "secret"
    secret.mkdir()
    Image.new("RGB", (4, 4), SECRET).save(secret / "s.png")
    (secret / "list.csv").write_text("path,label\ns.png,secret\ns.png,other\n")
    for number in range(-(-TOTAL // len(MAKERS))):
        change = Change(f"{kind} {number}", secret)
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(sound / kind, root, symlinks=True)
        name, asked = str(root), kind if change.random.random() < 0.6 else "auto"
        if kind == "hub":
            name, answer = "owner/name", answer_of_the_hub(change)
            monkeypatch.setattr("discl.data.readers.tabular.load_dataset", answer)
        else:
            change.apply(root)
        tried(lambda: read_all(name, asked, root), f"{kind} {number}: {asked}")  # noqa: B023
        if kind != "hub" and number % 4 == 0:
            out = tmp_path / f"{number}.yaml"
            tried(lambda: write_starter(root, out), f"{kind} {number}: init")  # noqa: B023


def tried(act: Callable[[], Any], what: str) -> None:
    """Lets a DisclError pass that says something, and nothing else."""
    try:
        with limited(SECONDS):
            act()
    except DisclError as error:
        assert 0 < len(str(error)) < 6_000, what
    except BaseException as error:
        error.add_note(what)
        raise


def read_all(name: str, kind: str, root: Path) -> None:
    """Reads tables and all images. Raises AssertionError if a file outside the root was opened."""
    opened.clear()
    watching[0] = True
    try:
        tables = read_tables(name, kind)
        for table in tables.values():
            inspect_images(table)
    finally:
        watching[0] = False
    outside = [
        path
        for path in opened
        if "/secret/" in path or path.startswith(("/dev/zero", "/proc/self/mem"))
    ]
    assert not outside
    for table in tables.values():
        for row in range(len(table)):
            try:
                picture = table.image(row)
            except DisclError:
                continue
            assert picture.getpixel((0, 0)) != SECRET
            assert 0 <= table.labels[row] < len(table.class_names) < 100


def answer_of_the_hub(change: Change) -> Callable[..., Any]:
    """What `datasets` gives for a name on the hub: splits with a column or the features changed."""
    values, features = rows()
    sound = Dataset.from_dict(values, features)
    odd = [None, [], {}, sound, {"train": sound, "test": None}, DatasetDict(), {"": sound}]
    if change.random.random() < 0.1:
        found: Any = change.random.choice(odd)
    else:
        table = sound.data.table
        at = change.random.randrange(table.num_columns)
        table = table.set_column(at, table.column_names[at], change.column(table.num_rows))
        changed = Dataset(table.replace_schema_metadata())
        found = {"train": changed, "test": change.random.choice((sound, changed))}
    return lambda *_, **__: found
