"""tools/write_ffcv.py: parses, calls, prints; errors are one line and exit code 2."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_samples import raw_dataset, write_idx
from PIL import Image

from fastar.data.encode import Encoding
from fastar.data.ffcv.folder import open_files
from fastar.errors import FastarError

TOOL = Path(__file__).resolve().parents[1] / "tools" / "write_ffcv.py"


def loaded(path):
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[path.stem] = module  # its worker processes look for it
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tool():
    return loaded(TOOL)


def test_converts_and_then_keeps(tool, tmp_path, capsys):
    write_idx(tmp_path / "raw", raw_dataset("mnist"), zipped=True)
    arguments = ["--dataset", "mnist", "--source", str(tmp_path / "raw"), "--out", str(tmp_path / "out")]
    assert tool.main([*arguments, "--workers", "1", "--limit", "20"]) == 0
    captured = capsys.readouterr()
    assert "train 20, test 20; digest" in captured.out
    assert "written with --limit: training refuses these files" in captured.out
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


SLOW = """
import os, runpy, sys, time
import fastar.data.encode as encode
true = encode._received
def slow(process):
    os.write(2, b"writing a sample")
    time.sleep(0.05)
    return true(process)
encode._received = slow
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("number", "group"),
    [
        (signal.SIGTERM, False),
        *(
            pytest.param(number, group, marks=pytest.mark.slow)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
            for group in (False, True)
            if group or number != signal.SIGTERM
        ),
    ],
)
def test_a_signal_leaves_nothing_and_says_so(folders, tmp_path, number, group):
    """While workers write, and not all need have begun: to the process alone, and to its workers too."""
    path = folders / "val" / "c1" / "1.JPEG"
    path.write_bytes((folders / "val" / "c0" / "0.JPEG").read_bytes())
    for copy in range(600):  # enough for two processes, and half a minute of writing
        (folders / "train" / "c0" / f"copy{copy}.JPEG").write_bytes(path.read_bytes())
    out = tmp_path / "deep" / "out"
    arguments = ["--dataset", "imagefolder", "--name", "mine", "--source", str(folders), "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(TOOL), *arguments], stderr=subprocess.PIPE, start_new_session=True
    )
    assert process.stderr is not None
    said = b""
    while b"writing a sample" not in said:
        more = process.stderr.read1()
        assert more, said
        said += more
    assert list(out.rglob("*.partial"))
    os.killpg(process.pid, number) if group else process.send_signal(number)
    said += process.communicate(timeout=300)[1]
    assert process.returncode == 128 + number, said
    how = "interrupted" if number == signal.SIGINT else f"stopped by {number.name}"
    assert said.decode().endswith(f"{how}; nothing unfinished was left behind\n"), said
    assert b"Traceback" not in said
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_while_it_is_imported(tmp_path, number):
    (tmp_path / "numba.py").write_text("print('importing', flush=True)\nimport time\ntime.sleep(300)\n")
    process = subprocess.Popen(
        [sys.executable, str(TOOL), "--dataset", "digits", "--out", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"importing\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 128 + number
    assert re.fullmatch(rb"(interrupted|stopped by SIGTERM); nothing unfinished was left behind\n", said), said


@pytest.fixture
def folders(tmp_path):
    """Two classes of images of any size, one of them cut off."""
    for split, count in (("train", 6), ("val", 2)):
        for number in range(count):
            path = tmp_path / "raw" / split / f"c{number % 2}" / f"{number}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (60 + number, 50), (40 * number, 80, 90)).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    return tmp_path / "raw"


def test_images_of_any_size(tool, folders, tmp_path, capsys):
    arguments = ["--dataset", "imagefolder", "--name", "mine", "--source", str(folders), "--out", str(tmp_path / "out")]
    assert tool.main(arguments) == 2
    said = capsys.readouterr().err
    assert "val/c1/1.JPEG: cannot be read as an image" in said
    assert said.endswith(
        "; replace or remove it, or leave such images out: python tools/write_ffcv.py --on-error skip\n"
    )
    asked = ["--preset", "rn18", "--jpeg-quality", "80", "--max-resolution", "0", "--order", "sorted"]
    assert tool.main([*arguments, *asked, "--on-error", "skip"]) == 0
    captured = capsys.readouterr()
    first, second = captured.out.splitlines()
    assert re.search(r"out/mine: train 6, test 1; digest [0-9a-f]{12}; \d+\.\d MB$", first)
    assert "left out of test: " in second
    assert "1.JPEG: cannot be read as an image" in second
    assert re.search(r"^mine: 8 images need about \d+\.\d MB in .*out/mine \([\d.,]+ [GM]B free\)$", captured.err, re.M)
    files = open_files(tmp_path / "out" / "mine")
    assert files.encoding == Encoding(None, 0.1, 80)
    assert not files.shuffled
    assert tool.main(arguments) == 0  # what is there will do where nothing else is asked for
    assert tool.main([*arguments, "--preset", "rn18"]) == 2


def test_class_folders_alone(tool, folders, tmp_path, capsys):
    out = tmp_path / "out"
    source = folders / "train"
    arguments = ["--dataset", "imagefolder", "--name", "mine", "--source", str(source), "--out", str(out)]
    assert tool.main(arguments) == 2
    assert "--val-share 0.1" in capsys.readouterr().err
    assert tool.main([*arguments, "--val-share", "0.4"]) == 0
    assert "out/mine: train 4, test 2; digest " in capsys.readouterr().out
    assert tool.main([*arguments, "--val-share", "0.1"]) == 2
    assert "written with val-share=0.4, asked for val-share=0.1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "imagefolder"], "needs --name NAME"),
        (["--dataset", "imagenet", "--name", "x"], "no other dataset takes one"),
        (["--dataset", "imagefolder", "--name", "cifar10"], "--name cifar10: is another dataset's"),
        (["--dataset", "imagefolder", "--name", "a/b"], "not a plain name"),
        (["--dataset", "cifar10", "--preset", "rn18"], "--preset belongs to imagenet and imagefolder"),
        (["--dataset", "digits", "--on-error", "skip"], "--on-error belongs to"),
        (["--dataset", "imagenet"], "holds no finished dataset; give the images with --data-root"),
        (["--dataset", "imagenet", "--source", "nowhere"], "nowhere: no such folder"),
        (["--dataset", "imagenet", "--jpeg-quality", "0"], "jpeg-quality=0 must be within 1..100"),
        (["--dataset", "imagenet", "--compress-probability", "2"], "compress-probability=2.0 must be"),
        (["--dataset", "imagenet", "--max-resolution", "-3"], "max-resolution=-3 must be"),
        (["--dataset", "imagenet", "--limit", "0"], "limit=0 must be"),
        (["--dataset", "imagenet", "--val-share", "0.1"], "--val-share belongs to imagefolder"),
        (["--dataset", "digits", "--val-share", "0.1"], "--val-share belongs to"),
        (["--dataset", "imagefolder", "--name", "x", "--val-share", "1"], "val-share=1.0 must be above 0 and below 1"),
    ],
)
def test_errors_about_images_are_one_line(tool, tmp_path, capsys, arguments, message):
    test_errors_are_one_line_and_code_2(tool, tmp_path, capsys, arguments, message)


def test_made_images_are_deterministic_and_of_every_class(tmp_path, capsys):
    make_images = loaded(TOOL.with_name("make_images.py"))
    make_images.make(tmp_path / "a", {"train": 10, "val": 10}, 0, 1)
    make_images.make(tmp_path / "b", {"train": 12, "val": 10}, 0, 2)
    make_images.make(tmp_path / "c", {"train": 10, "val": 10}, 1, 1)
    contents = [
        {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*.JPEG")}
        for root in (tmp_path / "a", tmp_path / "b", tmp_path / "c")
    ]
    assert contents[0].items() < contents[1].items()
    assert len(contents[1]) == 22
    assert not set(contents[0].values()) & set(contents[2].values())
    assert {path.split("/")[1] for path in contents[0]} == set(make_images.CLASSES)
    assert "20 images of 10 classes" in capsys.readouterr().out
    with pytest.raises(FastarError, match="train: is there already"):
        make_images.make(tmp_path / "a", {"train": 10, "val": 10}, 0, 1)
    with pytest.raises(FastarError, match="must be at least 10"):
        make_images.make(tmp_path / "d", {"train": 9, "val": 10}, 0, 1)


def test_a_pattern_is_its_class_s(tmp_path):
    """Symmetries that tell the patterns apart hold; colours and sizes vary."""
    make_images = loaded(TOOL.with_name("make_images.py"))
    y, x = (np.mgrid[:200, :200] - 100) / 200
    for name in make_images.CLASSES:
        drawn = [make_images.pattern(name, x, y, np.random.default_rng(seed)) for seed in range(20)]
        shares = [float(one.mean()) for one in drawn]
        assert all(one.dtype == bool and 0.05 < share < 0.95 for one, share in zip(drawn, shares, strict=True)), name
        assert len({one.tobytes() for one in drawn}) == 20
