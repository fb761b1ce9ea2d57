"""tools/write_ffcv.py: parses, calls, prints; errors are one line and exit code 2."""

import importlib.util
from pathlib import Path

import pytest
from data_samples import raw_dataset, write_idx

TOOL = Path(__file__).resolve().parents[1] / "tools" / "write_ffcv.py"


@pytest.fixture(scope="module")
def tool():
    specification = importlib.util.spec_from_file_location("write_ffcv", TOOL)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_converts_and_then_keeps(tool, tmp_path, capsys):
    write_idx(tmp_path / "raw", raw_dataset("mnist"), zipped=True)
    arguments = ["--dataset", "mnist", "--source", str(tmp_path / "raw"), "--out", str(tmp_path / "out")]
    assert tool.main([*arguments, "--workers", "1", "--limit", "20"]) == 0
    captured = capsys.readouterr()
    assert "train 20, test 20; digest" in captured.out
    assert "writing mnist train: 20 images in" in captured.err
    assert "images/s" in captured.err
    assert tool.main(arguments) == 2  # written with a limit, asked for without


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "cifar"], "unknown dataset 'cifar' (did you mean 'cifar10'?)"),
        (["--dataset", "cifar10", "--source", "nowhere"], "looked in nowhere"),
        (["--dataset", "digits", "--limit", "3"], "limit=3"),
        (["--dataset", "digits", "--workers", "0"], "workers=0"),
    ],
)
def test_errors_are_one_line_and_code_2(tool, tmp_path, capsys, arguments, message):
    assert tool.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_help_has_examples(tool, capsys):
    with pytest.raises(SystemExit) as caught:
        tool.main(["--help"])
    assert caught.value.code == 0
    assert "--dataset cifar10 --source" in capsys.readouterr().out
