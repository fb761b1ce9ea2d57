"""`fastar theory`: tables, JSON, files, pictures, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_cases import fastar

SMALL = ("--most", "8", "--draws", "10", "--quiet")


def test_a_certificate_with_its_files(tmp_path: Path) -> None:
    out, picture = tmp_path / "found" / "q.json", tmp_path / "q.png"
    outcome = fastar("theory", "certificate", *SMALL, "--out", str(out), "--picture", str(picture))
    assert (outcome.code, outcome.err) == (0, "")
    assert "to each of 10 thetas drawn; permutation: matching" in outcome.out
    assert "certified" not in outcome.out
    assert json.loads(out.read_text())["widths"] == [2, 4, 8]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_spiked_theta_leaves_nothing() -> None:
    outcome = fastar("theory", "certificate", *SMALL, "--most", "64", "--permutation", "sort", "--adversarial")
    assert "and the spiked theta" in outcome.out
    assert "false" in outcome.out
    outcome = fastar("theory", "certificate", *SMALL, "--permutation", "sort", "--adversarial", "--json")
    assert not any(share for row in json.loads(outcome.out)["q"] for share in row)


@pytest.mark.parametrize("what", ["linear", "elu"])
def test_two_layer_networks_beside_the_papers(what: str, tmp_path: Path) -> None:
    picture = tmp_path / "shares.png"
    outcome = fastar("theory", what, "--most", "2", "--draws", "5", "--quiet", "--picture", str(picture))
    assert (outcome.code, outcome.err) == (0, "")
    assert "share of star models among 5" in outcome.out
    assert {"linear": "0.12", "elu": "0.00"}[what] in outcome.out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["linaer"], "fastar theory linaer: did you mean 'linear'? choose one of certificate, linear, elu"),
        (["certificate", "--most", "0"], "--most 0: the largest width is a number from 2 to 1024"),
        (["certificate", "--permutation", "best"], "--permutation best: choose one of sort, matching, exact"),
        (["elu", "--draws", "1"], "--draws 1: give a number from 2 to 10000"),
        (["linear", "--adversarial"], "--adversarial belongs to `fastar theory certificate`: leave it out"),
        (["linear", "--picture", "a.pdf"], "a.pdf: the picture is written as .png; name it so"),
        (["linear", "--out", "."], "--out .: is a folder; name a file, such as theory.json"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], words: str) -> None:
    outcome = fastar("theory", *arguments)
    assert (outcome.code, outcome.out, outcome.err) == (2, "", f"fastar: {words}\n")
