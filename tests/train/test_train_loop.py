"""The loop in one process: accumulation, what ends it, what is published, what it says when it cannot go on."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trilemma
from trilemma.config import RunConfig, parse
from trilemma.data import Batch, Dataset
from trilemma.errors import CapabilityError, CheckpointError, ConfigError, DataError, TrainingError
from trilemma.models import SequenceModel
from trilemma.runs import RunDirectory
from trilemma.runs.load import load_run
from trilemma.runs.tensors import model_tensors
from trilemma.train import Event, loop, objective, train
from trilemma.train.choices import choose, reconcile
from trilemma.train.finish import average_checkpoints

Tiny = Callable[..., dict[str, Any]]


def losses(run: Path, name: str = "loss") -> list[float]:
    return [record[name] for record in RunDirectory(run).read_metrics() if name in record]


def merged(batches: list[Batch]) -> Batch:
    """Decoder-only micro-batches as one batch."""
    width = max(batch.inputs.shape[1] for batch in batches)

    def joined(name: str, value: int) -> Tensor:
        tensors = [getattr(batch, name) for batch in batches]
        return torch.cat([torch.nn.functional.pad(t, (0, width - t.shape[1]), value=value) for t in tensors])

    return Batch(
        inputs=joined("inputs", 0),
        labels=joined("labels", -100),
        lengths=torch.cat([batch.lengths for batch in batches]),
        source=None,
        source_lengths=None,
        prefix=torch.cat([batch.prefix for batch in batches if batch.prefix is not None]),
        segments=None,
        index=0,
        num_targets=sum(batch.num_targets for batch in batches),
        num_tokens=sum(batch.num_tokens for batch in batches),
    )


def test_unequal_micro_batches_are_one_large_batch(
    tiny_config: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four micro-batches of different sizes train like their union, in float64 to 1e-10."""
    config = tiny_config("decoder-only", accumulate=4, steps=3, precision="float64", ema=None)
    config["model"]["dropout"] = 0.0
    sizes: set[int] = set()
    real = Dataset.micro_batch

    def spying(self: Dataset, k: int) -> Batch:
        batch = real(self, k)
        sizes.add(batch.num_targets)
        return batch

    monkeypatch.setattr(Dataset, "micro_batch", spying)
    parts = train(config, out=tmp_path / "parts", quiet=True)
    assert len(sizes) > 3, "the micro-batches are equal: this test would prove nothing"
    monkeypatch.setattr(Dataset, "micro_batch", lambda self, k: merged([real(self, 4 * k + i) for i in range(4)]))
    config["training"]["accumulate"] = 1
    whole = train(config, out=tmp_path / "whole", quiet=True)
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-12)
    for one, two in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_planted_defect_a_mean_of_means_is_found(
    tiny_config: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Normalising each micro-batch by itself (OpenNMT-py#2209) gives other weights: the test above would see it."""
    config = tiny_config("decoder-only", accumulate=4, steps=3, precision="float64")
    config["model"]["dropout"] = 0.0
    right = train(config, out=tmp_path / "right", quiet=True)
    real = objective.backward

    def mean_of_means(head: Any, hidden: Tensor, labels: Tensor, smoothing: float, scale: float, size: int) -> Tensor:
        return real(head, hidden, labels, smoothing, 1 / (4 * int((labels != -100).sum())), size)

    monkeypatch.setattr(objective, "backward", mean_of_means)
    wrong = train(config, out=tmp_path / "wrong", quiet=True)
    differences = zip(right.model.parameters(), wrong.model.parameters(), strict=True)
    assert max(float((one - two).detach().abs().max()) for one, two in differences) > 1e-6


@pytest.mark.parametrize("layout", ["encoder-decoder", "decoder-only", "encoder-only"])
def test_it_learns_and_publishes_the_best(tiny_config: Tiny, tmp_path: Path, layout: str) -> None:
    config = tiny_config(layout, steps=40, checkpoint_every=10)
    run = train(config, out=tmp_path / "run", quiet=True)
    seen = losses(tmp_path / "run")
    assert sum(seen[-5:]) < 0.9 * sum(seen[:5])
    summary = run.directory.read_summary()
    valid = losses(tmp_path / "run", "valid_loss")
    assert summary["best_valid_loss"] == min(valid) == summary["valid_loss"]
    assert summary["parameters"] == run.model.parameter_counts()
    assert summary["ended_by"] == "steps"
    best = load_run(tmp_path / "run", checkpoint="best")
    for one, two in zip(run.model.parameters(), best.model.parameters(), strict=True):
        assert torch.equal(one, two)
    assert "## Limits" in run.directory.read_text("card.md")
    assert run.directory.read_config() == run.config
    assert run.config.model.vocab_size == run.tokenizer.vocab_size


def test_flops_and_tokens_are_counted_by_hand(tiny_config: Tiny, tmp_path: Path) -> None:
    run = train(tiny_config(steps=2), out=tmp_path / "run", quiet=True)
    dataset, _ = trilemma.data.prepare(run.config, run.tokenizer)
    batches = [dataset.micro_batch(k) for k in range(4)]
    flops = sum(
        3 * run.model.flops(int(length), int(source))
        for batch in batches
        for length, source in zip(batch.lengths, batch.source_lengths, strict=True)  # type: ignore[arg-type]
    )
    summary = run.directory.read_summary()
    assert summary["flops"] == flops
    assert summary["tokens"] == sum(int((batch.labels != -100).sum()) for batch in batches)
    assert summary["order_hash"] == dataset.order_hash(4)


def test_r_drop_counts_tokens_once_and_flops_twice(tiny_config: Tiny, tmp_path: Path) -> None:
    plain, twice = (
        train(tiny_config(steps=2, **options), out=tmp_path / name, quiet=True).directory.read_summary()
        for name, options in (("plain", {}), ("twice", {"r_drop": 5.0}))
    )
    assert twice["flops"] == 2 * plain["flops"]
    for name in ("tokens", "input_tokens", "order_hash", "data_hash", "parameters"):
        assert twice[name] == plain[name], name


@pytest.mark.parametrize("layout", ["encoder-decoder", "decoder-only", "encoder-only"])
def test_r_drop_runs_every_row_under_two_draws_of_dropout(
    tiny_config: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """The first loss is the naive one, over the hidden vectors of the two halves, which dropout made different."""
    seen: list[tuple[Tensor, Tensor, float]] = []
    real = objective.backward_twice

    def spying(head: Any, hidden: Tensor, labels: Tensor, smoothing: float, alpha: float, *rest: Any) -> Tensor:
        with torch.no_grad():
            scored = labels != objective.IGNORE
            logits = [head(half[scored]) for half in hidden.chunk(2)]
            entropy = sum(
                torch.nn.functional.cross_entropy(one, labels[scored], reduction="sum", label_smoothing=smoothing)
                for one in logits
            )
            p, q = (one.log_softmax(-1) for one in logits)
            divergence = (p.exp() * (p - q)).sum() + (q.exp() * (q - p)).sum()
        loss = real(head, hidden, labels, smoothing, alpha, *rest)
        assert float(divergence) > 0
        assert float(loss) == pytest.approx(float(entropy / 2 + alpha / 4 * divergence), rel=1e-10)
        seen.append((hidden, labels, alpha))
        return loss

    monkeypatch.setattr(objective, "backward_twice", spying)
    config = tiny_config(layout, steps=2, r_drop=3.0, precision="float64")
    train(config, out=tmp_path / "run", quiet=True)
    assert len(seen) == 4
    for hidden, labels, alpha in seen:
        assert len(hidden) == 2 * len(labels)
        assert alpha == 3.0
        assert not torch.equal(*hidden.chunk(2))


@pytest.mark.parametrize(
    ("limit", "ended"), [({"max_tokens": 900}, "max_tokens"), ({"max_seconds": 0.05}, "max_seconds")]
)
def test_other_limits(tiny_config: Tiny, tmp_path: Path, limit: dict[str, Any], ended: str) -> None:
    config = tiny_config(schedule="cosine", **limit)
    config["training"]["steps"] = None
    summary = train(config, out=tmp_path / "run", quiet=True).directory.read_summary()
    assert summary["ended_by"] == ended
    assert summary["tokens"] >= 900 or ended == "max_seconds"
    rates = losses(tmp_path / "run", "learning_rate")
    assert rates[-1] < max(rates) or ended == "max_seconds"


def test_early_stopping_survives_a_resume(tiny_config: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenNMT-py#2006: a resume forgot the patience. Validation losses are given: best at step 3, worse after it."""
    given = {3: 1.0, 6: 2.0, 7: 2.5, 9: 3.0, 12: 4.0}
    monkeypatch.setattr(loop.Trainer, "validation", lambda self: loop.Validation(given[self.counters.step], 10, 0))
    config = tiny_config(steps=7, patience=3)
    train(config, out=tmp_path / "run", quiet=True)
    config["training"]["steps"] = 40
    run = train(config, out=tmp_path / "run", resume=True, quiet=True)
    summary = run.directory.read_summary()
    assert (summary["ended_by"], summary["steps"], summary["best_step"]) == ("patience", 9, 3)
    assert run.directory.checkpoints() == [3, 7, 9], "the best is kept beside the last two"


def test_checkpoints_are_averaged(tiny_config: Tiny, tmp_path: Path) -> None:
    run = train(tiny_config(average_last=3, keep_checkpoints=1), out=tmp_path / "run", quiet=True)
    assert run.directory.checkpoints()[-3:] == [6, 9, 12]
    models = [load_run(tmp_path / "run", checkpoint=step).model for step in (6, 9, 12)]
    tensors = [model_tensors(model) for model in models]
    for name, value in model_tensors(run.model).items():
        mean = sum(t[name].detach().double() for t in tensors) / 3
        torch.testing.assert_close(value.detach().double(), mean, rtol=1e-6, atol=1e-7)
    again = average_checkpoints([(run.directory, step) for step in (6, 9, 12)], tensors[0])
    assert all(torch.equal(again[name], value.detach()) for name, value in model_tensors(run.model).items())


def test_the_moving_average_is_what_is_validated_and_published(tiny_config: Tiny, tmp_path: Path) -> None:
    run = train(tiny_config(ema=0.8), out=tmp_path / "run", quiet=True)
    raw = load_run(tmp_path / "run", checkpoint="best")
    assert "moving average 0.8" in run.directory.read_summary()["weights"]
    pairs = zip(run.model.parameters(), raw.model.parameters(), strict=True)
    assert any(not torch.equal(one, two) for one, two in pairs)


def test_a_nan_loss_names_the_batch_and_keeps_the_checkpoint(
    tiny_config: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = objective.backward, 0

    def poisoned(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return real(*arguments) * (math.nan if calls == 10 else 1.0)  # step 5, its second micro-batch

    monkeypatch.setattr(objective, "backward", poisoned)
    with pytest.raises(TrainingError) as error:
        train(tiny_config(), out=tmp_path / "run", quiet=True)
    message = str(error.value)
    assert "step 5: the loss is nan in batch 9 (seed 3); no weight was changed" in message
    assert "the last good checkpoint is step 3" in message
    directory = RunDirectory.open(tmp_path / "run")
    assert directory.checkpoints() == [3]
    failure = directory.read_failure()
    assert failure is not None
    assert (failure.step, str(failure)) == (5, message)
    monkeypatch.undo()
    assert train(tiny_config(), out=tmp_path / "run", resume=True, quiet=True).directory.checkpoints() == [9, 12]
    assert directory.read_failure() is None


def test_an_infinite_gradient_is_found_too(tiny_config: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = objective.backward

    def exploding(head: Any, hidden: Tensor, *rest: Any) -> Tensor:
        hidden.register_hook(lambda gradient: gradient * math.inf)
        return real(head, hidden, *rest)

    monkeypatch.setattr(objective, "backward", exploding)
    with pytest.raises(TrainingError, match=r"step 1: the gradient norm is (nan|inf) in batches 0 to 1"):
        train(tiny_config(), out=tmp_path / "run", quiet=True)
    assert RunDirectory(tmp_path / "run").checkpoints() == []


def test_dropout_depends_on_place_only() -> None:
    drawn = []
    for place in [(3, 1, 0), (3, 1, 1), (3, 2, 0), (4, 1, 0), (3, 1, 0), (3, 1, 0, 1)]:
        torch.randn(17)  # history
        loop.reseed(*place)
        drawn.append(torch.rand(4).tolist())
    assert drawn[0] == drawn[4]
    assert len({tuple(values) for values in drawn}) == 5


def test_validations_longer_than_training_are_named_and_may_be_sampled(
    tiny_config: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("trilemma.train.loop._LONG_VALIDATION", 0.0)
    config = tiny_config("decoder-only")
    config["data"] |= {"task": "language-model", "train": {"generated": "copy", "size": 300}}
    config["data"]["valid"]["size"] = 300
    train(config, out=tmp_path / "all")
    said = capsys.readouterr().err
    assert said.count("training.validate_tokens takes a sample, training.validate_every validates less often") == 1
    config["training"] |= {"validate_tokens": 128, "validate_every": 6}
    train(config, out=tmp_path / "sample")
    assert "validate_tokens" not in capsys.readouterr().err
    rates = [
        losses(tmp_path / name, "valid_bits_per_byte")[-1] / losses(tmp_path / name, "valid_loss")[-1]
        for name in ("all", "sample")
    ]
    assert rates[0] == pytest.approx(rates[1], rel=1e-6)  # tokens per byte, whatever share was read


def test_callbacks_see_and_stop(tiny_config: Tiny, tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []

    def watch(event: Event) -> bool:
        assert isinstance(event.model, SequenceModel)
        seen.append((event.kind, event.step))
        return event.kind == "step" and event.step == 4

    run = train(tiny_config(), out=tmp_path / "run", callbacks=[watch], quiet=True)
    assert run.directory.read_summary()["ended_by"] == "a callback"
    after_three = [("step", 3), ("validation", 3), ("checkpoint", 3)]
    assert seen == [("step", 1), ("step", 2), *after_three, ("step", 4), ("validation", 4), ("checkpoint", 4)]


def test_it_trains_from_an_iterable_and_in_another_thread(tiny_config: Tiny, tmp_path: Path) -> None:
    def pairs() -> Iterator[tuple[str, str]]:
        for number in range(60):
            yield f"a{number}", f"b{number}"

    results: list[Any] = []
    config = tiny_config(steps=2)
    del config["data"]["valid"]
    work = threading.Thread(
        target=lambda: results.append(trilemma.train(config, pairs(), tmp_path / "run", quiet=True))
    )
    work.start()
    work.join()
    assert results[0].config.notes["data"].startswith("given from Python")
    assert results[0].directory.read_summary()["best_step"] is None


def test_a_finished_run_resumed_is_left_as_it_is(tiny_config: Tiny, tmp_path: Path) -> None:
    train(tiny_config(steps=3), out=tmp_path / "run", quiet=True)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    train(tiny_config(steps=3), out=tmp_path / "run", resume=True, quiet=True)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_changed_data_are_noticed(tiny_config: Tiny, tmp_path: Path) -> None:
    texts = tmp_path / "t.tsv"
    texts.write_text("".join(f"a{i}\tb{i}\n" for i in range(50)))
    config = tiny_config(steps=3)
    config["data"] = {"task": "seq2seq", "train": {"path": str(texts)}}
    train(config, out=tmp_path / "run", quiet=True)
    texts.write_text("".join(f"a{i}\tb{i % 7}\n" for i in range(50)))
    config["training"]["steps"] = 6
    with pytest.raises(DataError, match="the data have changed since the run was started"):
        train(config, out=tmp_path / "run", resume=True, quiet=True)


def test_a_run_is_not_overwritten_nor_turned_into_another(tiny_config: Tiny, tmp_path: Path) -> None:
    train(tiny_config(steps=3), out=tmp_path / "run", quiet=True)
    with pytest.raises(CheckpointError, match="holds a run already; go on with --resume"):
        train(tiny_config(steps=3), out=tmp_path / "run", quiet=True)
    other = tiny_config(steps=6, batch_tokens=64)
    with pytest.raises(ConfigError, match=r"training\.batch_tokens is 64, but the run was started with 128"):
        train(other, out=tmp_path / "run", resume=True, quiet=True)


def test_choices_are_made_once_and_explained(tiny_config: Tiny, tmp_path: Path) -> None:
    config = tiny_config(steps=1, precision="auto", compile="auto", device="auto")
    run = train(config, out=tmp_path / "run", quiet=True)
    assert run.config.training.precision in ("float32", "bfloat16")
    assert (run.config.training.compile, run.config.training.device) in [("off", "cpu"), ("off", "cuda")]
    assert {"training.precision", "training.compile", "training.device"} <= run.config.notes.keys()
    kept = reconcile(parse(RunConfig, config), run.config)
    assert kept.training.precision == run.config.training.precision
    assert kept.notes == run.config.notes


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"steps": None}, "nothing ends this run"),
        ({"ema": 0.9, "average_last": 2}, "both choose the final weights"),
        ({"device": "cuda"}, "torch finds none"),
        ({"label_smoothing": 0.1, "task": "question-answering"}, "label_smoothing is not for question answering"),
        ({"label_smoothing": 0.0, "r_drop": 1.0, "task": "question-answering"}, "r_drop is not for question answering"),
        (
            {"r_drop": 1.0, "dropout": 0.0},
            r"training\.r_drop compares .* model\.dropout is 0: .*; raise model\.dropout",
        ),
    ],
)
def test_impossible_wishes(
    tiny_config: Tiny, training: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = tiny_config(**training)
    for section, key in (("data", "task"), ("model", "dropout")):
        if key in training:
            config[section][key] = config["training"].pop(key)
    with pytest.raises(ConfigError, match=message):
        choose(parse(RunConfig, config))


def test_compiling_what_cannot_be_compiled(tiny_config: Tiny, tmp_path: Path) -> None:
    config = tiny_config("decoder-only", compile="on")
    config["model"]["mixer"] = "lstm"
    with pytest.raises(CapabilityError, match=r"training\.compile is on, but mixer \"lstm\" is not compiled"):
        train(config, out=tmp_path / "run", quiet=True)
