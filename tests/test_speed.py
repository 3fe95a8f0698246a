import json

import pytest
from meta_files import BASE, model_folder

from eval.speed import main


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("place")
    model_folder(root, BASE)
    rows = [{"prompt": f"Say {i}.", "completion": "x" * (1 + 7 * (i % 9))} for i in range(40)]
    (root / "rows.json").write_text(json.dumps(rows))
    return root


def flags(place, **more):
    settings = {"model": place / "model", "data": place / "rows.json", "max-seq-len": 96} | more
    return ["train", *(w for name, value in settings.items() for w in (f"--{name}", str(value)))]


def test_packing_is_compared_in_two_runs_of_the_same_rows(place, tmp_path, capsys):
    output = tmp_path / "speed.json"
    main(flags(place, steps=6, **{"warmup-steps": 2}, output=output))
    said = json.loads(output.read_text())
    padded, packed = said["figures"]["padded"], said["figures"]["packed"]
    assert padded["ratio"] == 1
    assert packed["padding_share"] < padded["padding_share"] - 0.2
    for figure in (padded, packed):
        tokens, seconds = figure["supervised_tokens_per_second"], figure["median_step_seconds"]
        assert figure["ratio"] == tokens / padded["supervised_tokens_per_second"]
        assert tokens * seconds > 20  # learned tokens in a step
    assert {"date", "command", "device", "versions", "settings"} <= said.keys()
    assert "packed" in capsys.readouterr().out


def test_a_failing_run_is_shown_and_no_steps_are_refused(place, capsys):
    for more, message in (({"model": "nowhere"}, "nowhere"), ({"steps": 3}, "leaves nothing")):
        with pytest.raises(SystemExit) as ended:
            main(flags(place, **more))
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
