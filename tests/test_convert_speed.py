"""The conversion benchmark on a checkpoint of a few megabytes: what it writes, not how fast."""

import json

import pytest

pytest.importorskip("torch")

from convert.speed import command as speed

pytestmark = pytest.mark.integration


@pytest.mark.slow  # nine processes that import torch and JAX
def test_every_way_is_measured_beside_cp(tmp_path):
    output = tmp_path / "figures.json"
    place = ["--place", str(tmp_path), "--output", str(output)]
    speed.main(["--gigabytes", "0.001", "--shards", "2", "--repeats", "1", *place])
    found = json.loads(output.read_text())
    ways = found["figures"]["2 shards"]
    assert set(ways) == {"in from Meta", "out to Meta", "out to Hugging Face",
                         "in from Hugging Face"}  # fmt: skip
    exports = found["figures"]["exports"]
    assert set(exports) == {"to GGUF", "to GGUF in f16", "to GGUF in q8_0", "to GGUF, merged",
                            "to Hugging Face, merged"}  # fmt: skip
    for figure in (*ways.values(), *exports.values()):
        assert figure["ratio_to_cp"] == figure["seconds"] / figure["cp_seconds"]
        assert figure["peak_mib"] > figure["imports_mib"] > 50
    assert found["versions"]["torch"]
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


def test_numbers_that_measure_nothing_are_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        speed.main(["--repeats", "0"])
    assert ended.value.code == 2
    assert "--repeats 0, expected a whole number, at least 1" in capsys.readouterr().err
