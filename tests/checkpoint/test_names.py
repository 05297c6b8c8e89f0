from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packcast.checkpoint.names import MAX_DEPTH, clash_of, clashes_of, name_fault


@pytest.mark.parametrize(
    "name",
    [
        *("model.safetensors", "text_encoder/model-00001-of-00002.safetensors", "a..b", "a-"),
        *("a b/ü 漢字 (1).json", "x" * 255, "/".join("x" * MAX_DEPTH)),
        *("dev/null", "proc/self/environ", "console", "COM", "COM10", "CONF.json", "a.b.c"),
        *("nul_", "a b"),
    ],
)
def test_ordinary_names_are_allowed_even_if_they_look_special(name: str) -> None:
    assert name_fault(name) is None


@pytest.mark.parametrize(
    "name",
    [
        *("", "/etc/passwd", "../up", "a/../b", "a/./b", "./a", "a//b", "a/", ".hidden"),
        *("a/.hidden/b", "-rf", "a/-b", "a\\b", "a\nb", "a\x1b[2J", "a\x7f", "a\0b", "a\u202eb"),
        *("u\u0308", "\udcff", "x" * 256, "ü" * 128, "/".join("x" * (MAX_DEPTH + 1))),
    ],
)
def test_hostile_names_are_refused_with_a_reason(name: str) -> None:
    assert name_fault(name)


@given(st.text())
def test_an_allowed_name_never_leaves_its_directory(name: str) -> None:
    if name_fault(name) is None:
        name.encode()
        assert not name.startswith("/")
        assert not any(part in ("", ".", "..") for part in name.split("/"))


@pytest.mark.parametrize(
    ("names", "clash"),
    [
        (["a", "b/a", "b/c"], None),
        (["a", "ab/c", "a.b"], None),
        (["a", "b", "a"], ("a", "a")),
        (["Readme.md", "README.md"], ("Readme.md", "README.md")),
        (["stra\u00dfe", "STRASSE"], ("stra\u00dfe", "STRASSE")),
        (["a/b", "a"], ("a/b", "a")),
        (["A", "x", "a/b/c"], ("A", "a/b/c")),
    ],
)
def test_names_that_cannot_live_together_are_found(
    names: list[str], clash: tuple[str, str] | None
) -> None:
    assert clash_of(names) == clash


@given(st.lists(st.text("aA/\u00e9", min_size=1, max_size=5), max_size=12))
def test_without_those_that_clash_the_others_can_live_together(names: list[str]) -> None:
    left = list(names)
    for earlier, name in clashes_of(names):
        assert earlier in left
        assert clash_of([earlier, name]) == (earlier, name)
        left.reverse()
        left.remove(name)
        left.reverse()
    assert clash_of(left) is None


@pytest.mark.parametrize(
    "name",
    [
        *("CON", "con", "nul.txt", "sub/AUX.json", "Com1", "lpt9.tar.gz", "COM\u00b9", "prn .x"),
        *("a:b", "a:$DATA", "what?.md", "*.json", "a<b", "a>b", 'a"b', "a|b", "C:"),
        *("dots.", "a/dots../b", "space ", "space /a"),
    ],
)
def test_a_name_that_some_file_systems_do_not_take_is_refused(name: str) -> None:
    fault = name_fault(name)
    assert fault
    assert "some" in fault
