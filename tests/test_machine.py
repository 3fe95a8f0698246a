"""Homes, caches and limits of memory, as people and containers have them."""

import os
import pwd
import resource
import stat
import sys
from pathlib import Path

import pytest

from jllama import machine
from jllama.errors import InputError
from jllama.machine import use_private_compilation_cache, user_cache


@pytest.fixture
def home(monkeypatch, tmp_path):
    """No variables; a user whom the system gives this home."""
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    entry = list(pwd.getpwuid(os.getuid()))
    entry[5] = str(tmp_path / "home")
    monkeypatch.setattr(pwd, "getpwuid", lambda _: pwd.struct_passwd(entry))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def no_entry(_):
    raise KeyError("getpwuid(): uid not found")


@pytest.mark.parametrize(
    "variables",
    [{}, {"HOME": ""}, {"XDG_CACHE_HOME": ""}, {"XDG_CACHE_HOME": "relative"}],
)
def test_variables_that_are_empty_or_relative_are_as_if_unset(home, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    folder = user_cache("xla")
    assert folder == home / ".cache" / "jllama" / "xla"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert os.listdir() == ["home"]  # nothing in the working directory


def test_a_named_cache_needs_no_home_and_no_entry(home, monkeypatch, tmp_path):
    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert user_cache("xla") == tmp_path / "cache" / "jllama" / "xla"


@pytest.mark.parametrize("why", ["no entry", "a file", "foreign"])
def test_without_a_cache_there_is_no_word(home, monkeypatch, tmp_path, why, capsys):
    if why == "no entry":
        monkeypatch.setattr(pwd, "getpwuid", no_entry)
    elif why == "a file":
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    else:
        user = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: user + 1)
    with pytest.raises(OSError):  # noqa: PT011  # of any kind
        user_cache("xla")
    use_private_compilation_cache()
    assert capsys.readouterr() == ("", "")


def test_little_address_space_is_one_message(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (2**30, 2**30))
    with pytest.raises(InputError, match=r"1,024 MiB of address space.*ulimit -v unlimited"):
        machine.refuse_small_address_space()
    for enough in (resource.RLIM_INFINITY, 2**33):
        monkeypatch.setattr(resource, "getrlimit", lambda _, size=enough: (size, size))
        machine.refuse_small_address_space()


@pytest.mark.parametrize(
    ("limit", "host", "free"), [("max", 26_000, 9_000), (str(4 * 2**30), 6_096, 6_096)]
)
def test_a_containers_limit_counts(monkeypatch, tmp_path, limit, host, free):
    table = {"MemTotal": 24_000, "MemAvailable": 9_000, "SwapTotal": 2_000}
    monkeypatch.setattr(machine, "_meminfo", lambda: table)
    (tmp_path / "memory.max").write_text(limit + "\n")
    files = (str(tmp_path / "memory.max"), str(tmp_path / "none"))
    monkeypatch.setattr(machine, "_CONTAINER_LIMITS", files)
    assert machine.host_memory_mib() == host
    assert machine.free_memory_mib() == free


def test_where_the_system_tells_nothing_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(machine, "_meminfo", dict)
    monkeypatch.setattr(machine, "_CONTAINER_LIMITS", ())
    assert machine.host_memory_mib() == 0
    assert Path("/proc").is_dir() <= (machine.process_memory_mib() > 0)


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """A program `nvidia-smi` that tells of a card, and writes down how it was called."""
    program, asked = tmp_path / "nvidia-smi", tmp_path / "asked"
    program.write_text(f"#!/bin/sh\necho $* > {asked}\necho 'NVIDIA H200, 143771 MiB, 580.1'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    return asked


def test_results_name_the_card_its_driver_and_the_flags(driver, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_x=1")
    found = machine.measured_here("speed")
    assert found["gpu"] == {"name": "NVIDIA H200", "memory": "143771 MiB", "driver": "580.1"}
    assert found["flags"]["XLA_FLAGS"] == "--xla_x=1"
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert "gpu" not in machine.measured_here("speed")


@pytest.mark.parametrize("argv", [["jllama", "speed", "--x"], ["command.py", "--x"]])
def test_results_name_the_command_that_was_given(argv, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    assert machine.measured_here("speed")["command"] == ["jllama", "speed", "--x"]


def test_the_driver_is_asked_for_the_card_that_is_visible(driver, monkeypatch):
    assert machine.ask_driver("name", "memory.total", "driver_version")
    assert "--id" not in driver.read_text()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    machine.ask_driver("name", "memory.total", "driver_version")
    assert "--id=3" in driver.read_text()
    for hidden in ("", " "):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert machine.ask_driver("name") == {}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", "/nowhere")
    assert machine.ask_driver("name") == {}
