"""`trilemma verify`: exit codes, the JSON line, mistakes."""

from __future__ import annotations

import json

import pytest
import torch

from trilemma.cli.main import main


def test_a_lawful_mixer_gives_zero_and_one_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "gru", "--law", "split", "--law", "cost", "--seed", "5", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    report = json.loads(out)
    assert (report["ok"], report["seed"], report["level"]) == (True, 5, "quick")
    assert [law["law"] for law in report["mixers"]["gru"][0]["laws"]] == ["split", "cost"]
    assert len(report["mixers"]["gru"]) == 2
    assert report["oracles"]["gru"]["summary"].startswith("no outside oracle: it runs torch's own kernel")
    assert {record["mixer"] for record in report["oracles"]["gru"]["records"]} == {"gru"}


def test_the_table_names_laws_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "lstm", "--law", "split", "--law", "compile", "--seed", "5"]) == 0
    out = capsys.readouterr().out
    assert "split" in out
    assert "lstm: the law of compile says nothing: declared: torch's recurrent kernel is opaque to the compiler" in out
    assert out.splitlines()[-1].startswith("lstm: no outside oracle: it runs torch's own kernel")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to verify: name a mixer, or give --all or --plugin FILE"),
        (["retentoin"], 'unknown mixer "retentoin"; did you mean "retention"?'),
        (["gru", "--law", "splitt"], 'unknown law "splitt"; did you mean "split"?'),
        (["gru", "--level", "deep"], 'unknown level "deep" of the laws; valid: quick, full'),
        (["gru", "--device", "gpu"], 'unknown device "gpu"'),
        (["gru", "--variant", "9"], "has the variants 0 to 1; 9 is none of them"),
        (["gru", "--record", "--law", "split"], "--record writes down all laws, variants and paths"),
    ],
)
def test_mistakes_are_one_message(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_a_gpu_that_is_not_there_is_one_message(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["verify", "gru", "--device", "cuda"]) == 2
    error = capsys.readouterr().err
    assert "device cuda: torch finds none on this machine; use auto or cpu" in error
    assert "Traceback" not in error
