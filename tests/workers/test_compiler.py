"""The kernel cache: what is kept, what is rebuilt, and what goes wrong in words."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from workers.kernels.compiler import CompileError, load_library


@pytest.fixture
def kernels(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokenbus" / "kernels"


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "answer.cpp"
    path.write_text('extern "C" int answer() { return ANSWER; }')
    return path


def test_a_library_is_compiled_once_per_source_and_defines(kernels, source):
    assert load_library(source, ["ANSWER=41"]).answer() == 41
    [first] = kernels.iterdir()
    compiled = first.stat().st_mtime_ns
    assert load_library(source, ["ANSWER=41"]).answer() == 41
    assert first.stat().st_mtime_ns == compiled
    assert load_library(source, ["ANSWER=42"]).answer() == 42
    source.write_text('extern "C" int answer() { return ANSWER + 1; }')
    assert load_library(source, ["ANSWER=42"]).answer() == 43
    source.with_name("answer.h").write_text("")
    assert load_library(source, ["ANSWER=42"]).answer() == 43
    assert len(list(kernels.iterdir())) == 4


def test_compiling_at_once_leaves_one_whole_library(kernels, source):
    with ThreadPoolExecutor(8) as pool:
        libraries = list(pool.map(lambda _: load_library(source, ["ANSWER=7"]), range(8)))
    assert {library.answer() for library in libraries} == {7}
    assert len(list(kernels.iterdir())) == 1


def test_the_cache_is_private_to_the_user(kernels, source):
    load_library(source, ["ANSWER=1"])
    assert kernels.stat().st_mode & 0o077 == 0


def test_a_compiler_error_is_told(kernels, source):
    with pytest.raises(CompileError, match="ANSWER"):
        load_library(source)
    assert list(kernels.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_told(monkeypatch, source, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(CompileError, match="file"):
        load_library(source, ["ANSWER=1"])


def test_a_damaged_library_is_told(kernels, source, monkeypatch, tmp_path):
    load_library(source, ["ANSWER=1"])
    [library] = kernels.iterdir()
    # Another folder, since the loader knows the first one's library by now.
    damaged = tmp_path / "damaged" / "tokenbus" / "kernels" / library.name
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"not a library")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "damaged"))
    with pytest.raises(CompileError, match="damaged"):
        load_library(source, ["ANSWER=1"])
