"""Reliability 16: where a folder is made is decided before anything is read or written.

Nothing outside of it is ever emptied, and a name that cannot be taken costs nobody an hour.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("torch")

from meta_files import random_tensors, write_hf
from random_models import GROUPED

from convert import from_hf, from_meta, to_hf, to_meta
from jllama.errors import InputError
from jllama.folders import files
from jllama.folders.files import whole_folder


def make(destination: Path) -> None:
    with whole_folder(destination) as folder:
        (folder / "content").write_text("new")


def refused(destination: Path) -> str:
    with pytest.raises(InputError) as error:
        make(destination)
    return str(error.value)


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def mounted(tmp_path):
    """Mounts a folder on another one, or an empty disk where there is no source."""
    mounts: list[Path] = []

    def mount(place: Path, source: Path | None = None) -> None:
        what = ["--bind", str(source)] if source else ["-t", "tmpfs", "tmpfs"]
        try:
            subprocess.run(["mount", *what, str(place)], check=True, capture_output=True)
        except (FileNotFoundError, subprocess.CalledProcessError):
            pytest.skip("nothing can be mounted here")
        mounts.append(place)

    yield mount
    for place in mounts:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.parametrize("same_disk", [False, True])
@pytest.mark.parametrize("name", ["models", "my models"])
def test_an_empty_mount_point_is_refused_at_once(name, same_disk, mounted, tmp_path):
    """It could not be replaced by the finished folder."""
    place = tmp_path / name
    place.mkdir()
    (tmp_path / "source").mkdir()
    mounted(place, tmp_path / "source" if same_disk else None)
    before = everything(tmp_path)
    message = refused(place)
    assert f"{place} is a mount point" in message
    assert f"such as {place / 'NAME'}" in message
    assert everything(tmp_path) == before
    make(place / "model")
    assert os.listdir(place) == ["model"]


def test_a_link_is_followed_before_anything_is_written(tmp_path):
    """The temporary folder lies beside the target: a rename does not cross disks."""
    (tmp_path / "big disk").mkdir()
    link = tmp_path / "model"
    link.symlink_to(tmp_path / "big disk" / "model")
    with whole_folder(link) as folder:
        assert folder.parent == tmp_path / "big disk"
        (folder / "content").write_text("new")
    assert link.is_symlink()
    assert (tmp_path / "big disk" / "model" / "content").read_text() == "new"
    assert "exists" in refused(link)
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "link").symlink_to(empty)
    make(tmp_path / "link")
    assert os.listdir(empty) == ["content"]


def test_a_destination_that_cannot_be_made_is_refused_before_anything_is_read(
    tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "no disk").symlink_to(tmp_path / "unmounted" / "model")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    before = everything(tmp_path)
    cases = {
        ".": "is no new folder; name one in it",
        "/": "is no new folder",
        "..": "is no new folder",
        "../empty": "is the working directory",
        "../file": "file exists",
        "../file/model": "file is no folder that may be written to",
        "../no disk": "but there is no",
        "../circle": "is a link to itself",
    }
    for destination, message in cases.items():
        for command in (from_meta, from_hf, to_hf, to_meta):  # their source is not even looked for
            with pytest.raises(SystemExit) as ended:
                command.main([str(tmp_path / "no source"), destination])
            assert ended.value.code == 2
        assert message in refused(Path(destination))
    assert everything(tmp_path) == before


def test_the_message_of_a_destination_comes_before_that_of_the_source(tmp_path, capsys):
    (tmp_path / "mine").write_text("mine")
    for command in (from_meta, from_hf, to_hf, to_meta):
        with pytest.raises(SystemExit):
            command.main([str(tmp_path / "no source"), str(tmp_path / "mine")])
        assert "mine exists; remove it" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["link to a folder", "link to nothing", "file"])
def test_what_lies_under_the_temporary_name_is_never_followed_or_emptied(kind, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "mine").write_text("mine")
    partial = tmp_path / ".model.partial"
    if kind == "file":
        partial.write_text("mine")
    else:
        partial.symlink_to(tmp_path / ("precious" if kind == "link to a folder" else "none"))
    before = everything(tmp_path)
    assert f"{partial} is in the way" in refused(tmp_path / "model")
    assert everything(tmp_path) == before
    assert (tmp_path / "precious" / "mine").read_text() == "mine"


def test_a_link_in_an_interrupted_folder_is_not_written_through(tmp_path):
    """It is begun anew, and what the link names stays."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "mine").write_text("mine")
    origin = {"files": []}

    def stopped():
        with whole_folder(tmp_path / "model", origin) as folder:
            (folder / "blocks").symlink_to(tmp_path / "precious")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    with whole_folder(tmp_path / "model", origin) as folder:
        assert not (folder / "blocks").exists()
    assert (tmp_path / "precious" / "mine").read_text() == "mine"


def test_a_name_that_is_lost_at_the_last_moment_does_not_lose_the_work(tmp_path):

    def overtaken():
        with whole_folder(tmp_path / "model") as folder:
            (folder / "content").write_text("hours of work")
            (tmp_path / "model").mkdir()
            (tmp_path / "model" / "mine").touch()

    with pytest.raises(InputError) as error:
        overtaken()
    assert "cannot take its name (Directory not empty)" in str(error.value)
    assert f"mv {tmp_path / '.model.partial'} NAME" in str(error.value)
    assert (tmp_path / ".model.partial" / "content").read_text() == "hours of work"
    assert os.listdir(tmp_path / "model") == ["mine"]


def test_free_space_is_that_of_the_disk_behind_a_link(tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "other" / "model")
    asked = []
    usage = files.shutil.disk_usage
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: asked.append(path) or usage(path))
    with files.room_for(1, tmp_path / "model"):
        pass
    assert set(asked) == {tmp_path / "other"}


# ------------------------------------------------------------------------ what is no regular file


@pytest.fixture(scope="module")
def sources(original, tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    from_meta.convert(from_meta.FromMeta(original, root / "model"))
    return {
        "meta": original,
        "hf": write_hf(root / "hf", random_tensors(GROUPED), GROUPED),
        "model": root / "model",
    }


INPUTS = [
    ("meta", name, from_meta) for name in ("consolidated.00.pth", "params.json", "tokenizer.model")
] + [
    ("hf", "model.safetensors", from_hf),
    ("hf", "config.json", from_hf),
    ("hf", "tokenizer.model", from_hf),
    ("model", "config.json", to_hf),
    ("model", "manifest.json", to_meta),
    ("model", "tokenizer.model", to_hf),
    ("model", "blocks/head.safetensors", to_meta),
]


@pytest.mark.parametrize("kind", ["named pipe", "device", "folder"])
@pytest.mark.parametrize(("source", "name", "command"), INPUTS)
def test_a_pipe_a_device_or_a_folder_in_place_of_a_file_ends_in_one_message(
    source, name, command, kind, sources, tmp_path, capsys
):
    """Who reads a pipe that nobody writes waits for ever."""
    folder = Path(shutil.copytree(sources[source], tmp_path / source))
    (folder / name).unlink()
    if kind == "named pipe":
        os.mkfifo(folder / name)
    elif kind == "device":
        (folder / name).symlink_to("/dev/zero")
    else:
        (folder / name).mkdir()
    with pytest.raises(SystemExit) as ended:
        command.main([str(folder), str(tmp_path / "out")])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") <= 2
    assert f"{Path(name).name}: is a {kind}; expected" in said
    assert os.listdir(tmp_path) == [source]
