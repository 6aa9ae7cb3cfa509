"""Digests and seeds: the same in every process, different for different parts."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from discl.utils.hashing import derive_seed, digest, digest_bytes, digest_files

PARTS = ("source", 3, 0.5, True, None, ["ä", {"b": 1, "a": [2]}])


def test_digest_is_that_of_the_canonical_json() -> None:
    text = '["source",3,0.5,true,null,["ä",{"a":[2],"b":1}]]'
    assert digest(*PARTS) == hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    assert derive_seed(*PARTS) == int(digest(*PARTS)[:16], 16) // 2


def test_digests_do_not_depend_on_the_process() -> None:
    code = (
        "from discl.utils.hashing import digest, derive_seed; "
        f"print(digest(*{PARTS!r}), derive_seed(*{PARTS!r}))"
    )
    answers = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for seed in ("1", "2")
    ]
    assert answers == [[digest(*PARTS), str(derive_seed(*PARTS))]] * 2


def test_different_parts_have_different_digests() -> None:
    parts = [
        (),
        ("",),
        ("a", "b"),
        ("ab",),
        ("a,b",),
        ('a","b',),
        (["a", "b"],),
        (1,),
        ("1",),
        (1.0,),
        (True,),
        (None,),
        ({},),
        ({"a": 1},),
    ]
    assert len({digest(*each) for each in parts}) == len(parts)
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


def test_what_is_no_plain_value_is_refused() -> None:
    with pytest.raises(TypeError):
        digest(Path("folder"))


def test_seeds_fit_into_63_bits_and_are_spread_evenly() -> None:
    seeds = [derive_seed("image", number) for number in range(2000)]
    assert len(set(seeds)) == 2000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert 900 < sum(seed % 2 for seed in seeds) < 1100
    assert 900 < sum(seed >= 2**62 for seed in seeds) < 1100


def test_digest_bytes_is_of_the_concatenation() -> None:
    assert (
        digest_bytes(b"ab", b"c")
        == digest_bytes(b"abc")
        == hashlib.blake2b(b"abc", digest_size=16).hexdigest()
    )


def test_digest_files_sees_names_and_contents_but_not_the_place_or_the_order(
    tmp_path: Path,
) -> None:
    def write(folder: str, **contents: str) -> str:
        root = tmp_path / folder
        (root / "sub").mkdir(parents=True)
        files = []
        for name, text in contents.items():
            files.append(root / "sub" / name)
            files[-1].write_text(text)
        return digest_files(files, root)

    same = write("one", a="1", b="2")
    assert write("two", b="2", a="1") == same
    assert (
        len(
            {
                same,
                write("three", a="2", b="1"),
                write("four", a="1", c="2"),
                write("five", a="12", b=""),
            }
        )
        == 4
    )
