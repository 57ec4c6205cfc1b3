"""The library of the fused operator is found, compiled, or done without."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from memory_inputs import Case, assert_same, needs_fused, random_inputs, record, record_calls, whole

from hamt.cpu import library as build
from hamt.cpu.fused import fused_available

CASE = Case("phasor", "delta", rotates=True)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache folder, and no memory of a library found before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("HAMT_FUSED", raising=False)
    build.compiled_library.cache_clear()
    yield tmp_path / "hamt"
    build.compiled_library.cache_clear()


@pytest.fixture
def compiler(monkeypatch, cache) -> Callable[..., list[list[str]]]:
    """A stand-in for every compiler hands out a library compiled before and logs its commands."""
    build.compiled_library.cache_clear()
    monkeypatch.delenv("XDG_CACHE_HOME")
    library = build.fused_library()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    build.compiled_library.cache_clear()

    def stand_in(refuses: str = "nothing") -> list[list[str]]:
        commands = []

        def run(command, **options):
            commands.append(command)
            if refuses in command:
                raise subprocess.CalledProcessError(
                    1, command, stderr="in line 3:\nerror: no such option\n^"
                )
            if "--version" not in command:
                shutil.copy(library._name, command[command.index("-o") + 1])
            return subprocess.CompletedProcess(command, 0, stdout="version 1")

        monkeypatch.setattr(build.subprocess, "run", run)
        return commands

    return stand_in


def no_compiler(monkeypatch, folder):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)


def switched_off(monkeypatch, folder):
    monkeypatch.setenv("HAMT_FUSED", "0")


def a_compiler_that_fails(monkeypatch, folder, line="[ $1 = --version ] || exit 1"):
    script = folder / "compiler"
    script.write_text(f"#!/bin/sh\n{line}\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))


def a_compiler_that_does_not_start(monkeypatch, folder):
    a_compiler_that_fails(monkeypatch, folder, "exit 1")


TROUBLES = [no_compiler, switched_off, a_compiler_that_fails, a_compiler_that_does_not_start]


@pytest.mark.parametrize("trouble", TROUBLES)
def test_without_a_library_the_chunked_form_takes_over(trouble, monkeypatch, cache, tmp_path):
    trouble(monkeypatch, tmp_path)
    if trouble is switched_off:
        assert not fused_available(torch.empty(0))
    else:
        with pytest.warns(UserWarning, match="without its fused operator for CPUs"):
            assert not fused_available(torch.empty(0))
    inputs = random_inputs(CASE, 20)
    seen = record(whole(CASE.memory(), None), inputs)
    assert_same(seen, record(whole(CASE.memory(), "chunked"), inputs), 0)
    with pytest.raises(ValueError, match="not available"):
        whole(CASE.memory(), "fused")(inputs)
    token = {name: x if name.startswith("initial") else x[:, :1] for name, x in inputs.items()}
    seen = record(whole(CASE.memory(), None), token)
    assert_same(seen, record(whole(CASE.memory(), "recurrent"), token), 0)
    assert not list(cache.glob("*.so"))


@needs_fused
def test_with_a_library_it_is_the_fused_form_that_runs(monkeypatch):
    calls = record_calls(monkeypatch)
    for length in (1, 20):
        whole(CASE.memory(), None)(random_inputs(CASE, length))
    assert [name for name, _, _ in calls] == ["forward"] * 2
    assert not fused_available(torch.empty(0, device="meta"))


@needs_fused
def test_an_empty_cache_is_filled_by_the_compiler_of_the_machine(cache, monkeypatch):
    calls = record_calls(monkeypatch)
    whole(CASE.memory(), None)(random_inputs(CASE, 20))
    assert [name for name, _, _ in calls] == ["forward"]
    (library,) = cache.iterdir()
    assert build.fused_library()._name == str(library)


@needs_fused
def test_what_was_compiled_before_is_not_compiled_again(cache, compiler):
    commands = compiler()
    assert fused_available(torch.empty(0))
    assert fused_available(torch.empty(0))
    assert ["--version" in command for command in commands] == [True, False, False]
    commands.clear()
    build.compiled_library.cache_clear()
    assert fused_available(torch.empty(0))
    assert ["--version" in command for command in commands] == [True]


@needs_fused
def test_another_source_or_processor_is_compiled_anew(monkeypatch, cache, compiler, tmp_path):
    compiler()
    folder = shutil.copytree(build.FOLDER, tmp_path / "cpu")
    with (folder / "recurrence.h").open("a", encoding="utf-8") as header:
        header.write("// changed\n")
    changes = {"FOLDER": folder, "_processor": lambda: "another"}
    for expected, (name, change) in enumerate(changes.items(), start=1):
        assert fused_available(torch.empty(0))
        assert len(list(cache.glob("*.so"))) == expected
        monkeypatch.setattr(build, name, change)
        build.compiled_library.cache_clear()
    assert fused_available(torch.empty(0))
    assert len(list(cache.glob("*.so"))) == 3


def cut_short(library):
    with library.open("r+b") as file:
        file.truncate(library.stat().st_size // 3)


def emptied(library):
    library.write_bytes(b"")


def altered_by_a_bit(library):
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    library.write_bytes(content)


def longer(library):
    library.write_bytes(library.read_bytes() + b"\0")


def another_file(library):
    library.write_text("not a library", encoding="utf-8")


def writable_by_others(library):
    library.chmod(0o777)


def writable_by_a_group(library):
    library.chmod(0o770)


def unreadable(library):
    library.unlink()
    library.symlink_to("nowhere")


def renamed(library):
    library.rename(library.with_name(library.name[:-4] + "0.so"))


def gone(library):
    library.unlink()


DAMAGES = [cut_short, emptied, altered_by_a_bit, longer, another_file]
DAMAGES += [writable_by_others, writable_by_a_group, unreadable, renamed, gone]


@needs_fused
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_library_is_not_loaded_but_built_anew(damage, cache, compiler):
    commands = compiler()
    assert fused_available(torch.empty(0))
    (library,) = cache.glob("*.so")
    # This process has mapped it: damage a copy in its place.
    copy = library.with_suffix(".copy")
    shutil.copy(library, copy)
    copy.replace(library)
    damage(library)
    commands.clear()
    build.compiled_library.cache_clear()
    assert fused_available(torch.empty(0))
    assert any("-c" in command for command in commands), "it was compiled"
    whole(CASE.memory(), "fused")(random_inputs(CASE, 20))
    commands.clear()
    build.compiled_library.cache_clear()
    assert fused_available(torch.empty(0))
    assert ["--version" in command for command in commands] == [True], "and is sound now"


@needs_fused
@pytest.mark.parametrize("words", ["g++ -O0", "g++ -fsanitize=address", "g++ -march=x86-64"])
def test_what_other_words_built_is_left_to_them(words, monkeypatch, cache, compiler):
    commands = compiler()
    monkeypatch.setenv("CXX", words)
    assert fused_available(torch.empty(0))
    monkeypatch.delenv("CXX")
    build.compiled_library.cache_clear()
    commands.clear()
    assert fused_available(torch.empty(0))
    assert any("-c" in command for command in commands)
    assert len(list(cache.glob("*.so"))) == 2


@needs_fused
@pytest.mark.parametrize("made_by", ["this", "another part of HAMT"])
def test_a_umask_that_opens_files_to_a_group_compiles_once(made_by, cache, compiler):
    commands, before = compiler(), os.umask(0o002)
    try:
        if made_by != "this":
            (cache / "tokens").mkdir(parents=True)
        for compiled in (True, False):
            build.compiled_library.cache_clear()
            commands.clear()
            assert fused_available(torch.empty(0))
            assert any("-c" in command for command in commands) == compiled
    finally:
        os.umask(before)
    (library,) = cache.glob("*.so")
    assert not (library.stat().st_mode | cache.stat().st_mode) & 0o022


@needs_fused
def test_two_builds_at_once_both_have_their_library(cache, compiler):
    compiler()
    source = build.FOLDER / "fused.cpp"
    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(lambda flag: build._compile(source, ["g++"], [flag]), ["-fopenmp"] * 4)
        )
    assert all(build._sound(library) for library in found)
    assert sorted(cache.iterdir()) == sorted(set(found))


@needs_fused
def test_a_compiler_without_openmp_compiles_for_one_thread(compiler):
    commands = compiler(refuses="-fopenmp")
    assert fused_available(torch.empty(0))
    assert ["-fopenmp" in command for command in commands if "-c" in command] == [True, False]


def an_unwritable_cache(monkeypatch, folder):
    (folder / "file").touch()  # a mode would not stop root
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "file"))


def a_cache_that_others_may_write_to(monkeypatch, folder):
    (folder / "hamt").mkdir()
    (folder / "hamt").chmod(0o777)


def a_cache_of_another_user(monkeypatch, folder):
    monkeypatch.setattr(build.os, "getuid", lambda: -1)


def no_home(monkeypatch, folder):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(Path, "home", home)


@needs_fused
@pytest.mark.parametrize(
    "trouble",
    [an_unwritable_cache, a_cache_that_others_may_write_to, a_cache_of_another_user, no_home],
)
def test_a_cache_that_cannot_be_used_is_replaced_by_a_folder_for_the_process(
    trouble, monkeypatch, cache, compiler, tmp_path
):
    compiler()
    trouble(monkeypatch, tmp_path)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(build.tempfile, "tempdir", str(temporary))
    assert fused_available(torch.empty(0))
    assert len(list(temporary.glob("hamt-*/*.so"))) == 1
    assert not list(tmp_path.glob("hamt/*.so"))


@needs_fused
def test_a_failing_compiler_is_quoted(compiler):
    compiler(refuses="-c")
    with pytest.warns(UserWarning, match="no such option") as warned:
        assert not fused_available(torch.empty(0))
    assert "\n" not in str(warned[0].message)


@pytest.mark.parametrize(
    "line", ["flags : avx512f", "model name : EPYC", "CPU part : 0xd40", "Features : asimd sve"]
)
def test_the_processor_is_told_by_every_architecture(line, monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda path: True)
    told = f"processor : 0\n{line}\nbogomips : 5"
    monkeypatch.setattr(Path, "read_text", lambda path, encoding: told)
    assert build._processor().splitlines()[1:] == [line]


@pytest.mark.slow
def test_the_command_says_once_and_before_the_text_that_there_is_no_library(tmp_path):
    """In one line, not amid the words that are streamed."""
    paths = {
        "HOME": str(tmp_path),
        "PATH": str(tmp_path),
        "PYTHONPATH": str(build.FOLDER.parents[1]),
    }
    words = ["-m", "hamt", "generate", "Fellow", "--max_new_tokens", "2", "--seed", "0"]
    ran = subprocess.run(
        [sys.executable, *words], env=paths, stdout=-1, stderr=subprocess.STDOUT, text=True
    )
    first, *others = ran.stdout.splitlines()
    assert first.startswith("hamt: HAMT runs without its fused operator for CPUs")
    assert others[0].startswith("Fellow")
    assert ran.returncode == 0
