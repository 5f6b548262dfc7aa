"""`--from RUN`: a run that begins with another's weights and tokenizer, for every layout, or says why it cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from trilemma.cli.main import main
from trilemma.errors import ConfigError, Interrupted
from trilemma.runs.load import LoadedRun
from trilemma.runs.tensors import model_tensors
from trilemma.train import train
from trilemma.train.loop import Event

Tiny = Callable[..., dict[str, Any]]
TEXTS = ["a b a c", "b c c", "c a b b", "a", "", "c c b a", "a a", "b"] * 4


@pytest.fixture
def parents(tiny_config: Tiny, tmp_path: Path) -> Callable[..., LoadedRun]:
    def make(layout: str, **changes: Any) -> LoadedRun:
        config = tiny_config(layout, steps=3)
        for section, values in changes.items():
            config[section] = {**config[section], **values}
        return train(config, out=tmp_path / f"parent-{layout}", quiet=True)

    return make


def child(parent: LoadedRun, tiny: Tiny, **training: Any) -> dict[str, Any]:
    """The recipe of a run from another: data and training alone."""
    config = tiny(parent.config.model.layout, **{"learning_rate": 1e-12, "weight_decay": 0.0, **training})
    del config["model"], config["tokenizer"]
    return {**config, "start_from": str(parent.directory.path)}


@pytest.mark.parametrize("layout", ["encoder-decoder", "decoder-only", "encoder-only"])
def test_a_run_goes_on_with_all_weights_of_another(
    parents: Callable[..., LoadedRun], tiny_config: Tiny, tmp_path: Path, layout: str
) -> None:
    parent = parents(layout)
    run = train(child(parent, tiny_config, steps=1), out=tmp_path / "child", quiet=True)
    for name, tensor in model_tensors(parent.model).items():
        torch.testing.assert_close(model_tensors(run.model)[name], tensor, atol=1e-8, rtol=0)
    assert run.tokenizer.fingerprint == parent.tokenizer.fingerprint
    count = len(model_tensors(run.model))
    assert run.config.notes["start_from"].startswith(f"{count} of {count} tensors taken, and the tokenizer")
    assert "new:" not in run.config.notes["start_from"]


def test_an_encoder_gets_a_new_head(parents: Callable[..., LoadedRun], tiny_config: Tiny, tmp_path: Path) -> None:
    parent = parents("encoder-only", model={"tie_embeddings": False, "logit_bias": True, "mixer": "gru"})
    config = child(parent, tiny_config, steps=1)
    config["data"] = {"task": "classification"}
    config["model"] = {"dropout": 0.5, "pooling": "first"}
    examples = [(text, str(len(text) % 2)) for text in TEXTS]
    run = train(config, data={"train": examples}, out=tmp_path / "classes", quiet=True)
    assert run.config.model.mixer == "gru"
    assert (run.config.model.dropout, run.config.model.pooling, run.config.model.num_labels) == (0.5, "first", 2)
    held, new = model_tensors(parent.model), model_tensors(run.model)
    assert run.config.notes["start_from"].endswith(
        "; new: output.bias, output.weight; left behind: logit_bias, output.weight"
    )
    for name in new.keys() - {"output.weight", "output.bias"}:
        torch.testing.assert_close(new[name], held[name], atol=1e-8, rtol=0)
    again = {**child(run, tiny_config, steps=1), "data": {"task": "classification"}}
    same = train(again, data={"train": examples}, out=tmp_path / "same", quiet=True)
    torch.testing.assert_close(model_tensors(same.model)["output.weight"], new["output.weight"], atol=1e-8, rtol=0)
    others = train(again, data={"train": [(t, f"L{y}") for t, y in examples]}, out=tmp_path / "other", quiet=True)
    assert "new: output.bias, output.weight" in others.config.notes["start_from"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"d_model": 24}}, "model.d_model is 24, but .*parent-decoder-only has 16"),
        ({"model": {"layout": "encoder-only"}}, "model.layout is 'encoder-only', but .* has 'decoder-only'"),
        ({"model": {"num_heads": 4}}, "model.num_heads is 4, but .* has 2"),
        ({"tokenizer": {"vocab_size": 9}}, "tokenizer.vocab_size is 9, but .* has 8000"),
        ({"data": {"task": "seq2seq", "lowercase": True}}, "data.lowercase is True, but .* with False"),
        ({"start_from": "nowhere"}, "nowhere: no such folder"),
        (
            {"data": {"task": "probe", "train": {"generated": "copying"}}, "tokenizer": {"kind": "task"}},
            "tokenizer.kind is 'task', but .* has 'character'",
        ),
    ],
)
def test_what_the_weights_do_not_allow_is_named(
    parents: Callable[..., LoadedRun], tiny_config: Tiny, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    config = {**child(parents("decoder-only"), tiny_config, steps=1), **change}
    with pytest.raises(Exception, match=message) as caught:
        train(config, out=tmp_path / "child", quiet=True)
    assert type(caught.value).__module__ == "trilemma.errors"
    assert not (tmp_path / "child" / "manifest.json").exists()


def test_an_unfinished_run_is_no_start(tiny_config: Tiny, tmp_path: Path) -> None:
    def stop(event: Event) -> bool:
        raise Interrupted("stopped", 15)

    with pytest.raises(Interrupted):
        train(tiny_config("decoder-only"), out=tmp_path / "parent", quiet=True, callbacks=[stop])
    config = {**tiny_config("decoder-only"), "start_from": str(tmp_path / "parent")}
    with pytest.raises(Exception, match="training has not ended"):
        train(config, out=tmp_path / "child", quiet=True)


def test_a_resumed_run_began_where_it_began(
    parents: Callable[..., LoadedRun], tiny_config: Tiny, tmp_path: Path
) -> None:
    parent = parents("decoder-only")
    config = child(parent, tiny_config, steps=6, learning_rate=0.01)

    def stop(event: Event) -> bool:
        if event.kind == "step" and event.step == 2:  # before the first checkpoint
            raise Interrupted("stopped", 15)
        return False

    whole = train(config, out=tmp_path / "whole", quiet=True)
    with pytest.raises(Interrupted):
        train(config, out=tmp_path / "cut", quiet=True, callbacks=[stop])
    cut = train(config, out=tmp_path / "cut", resume=True, quiet=True)
    for name, tensor in model_tensors(whole.model).items():
        assert torch.equal(model_tensors(cut.model)[name], tensor)
    with pytest.raises(ConfigError, match="start_from is 'elsewhere', but the run was started with"):
        train({**config, "start_from": "elsewhere"}, out=tmp_path / "cut", resume=True, quiet=True)


def test_the_verb(
    parents: Callable[..., LoadedRun], tiny_config: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = parents("encoder-decoder")
    config = child(parent, tiny_config, steps=3)
    del config["start_from"]
    file, out = tmp_path / "config.yaml", str(tmp_path / "child")
    file.write_text(yaml.safe_dump(config))
    assert main(["train", str(file), "--out", out, "--from", str(parent.directory.path)]) == 0
    assert "tensors taken, and the tokenizer" in capsys.readouterr().err
    assert main(["train", out, "--resume", "training.steps=4"]) == 0
    assert main(["train", str(file), "--out", out, "--resume", "training.steps=5"]) == 0
    capsys.readouterr()
    assert main(["train", str(file), "--out", out + "2", "--from", str(tmp_path)]) == 2
    assert "no run here" in capsys.readouterr().err


def test_a_plan_is_that_of_the_architecture_that_is_taken(
    parents: Callable[..., LoadedRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = parents("encoder-only")
    file = tmp_path / "config.yaml"
    config = {
        "data": {"task": "question-answering"},
        "model": {"layout": "encoder-only", "pooling": "none"},
        "training": {"steps": 5},
    }
    file.write_text(yaml.safe_dump(config))
    assert main(["plan", str(file), f"start_from={parent.directory.path}", "--on", "A100", "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out.splitlines()[-1])["plans"]
    assert plan["parameters"]["total"] == parent.model.parameter_counts()["total"] + 2 * 16 + 2
    assert (plan["rows"]["length"], plan["rows"]["targets"]) == (256, 1)
    assert main(["plan", str(file), "start_from=nowhere"]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err
