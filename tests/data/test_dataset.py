"""Datasets end to end: what each task and layout is given, and that nothing is lost between file and batch."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trilemma.config import RunConfig, parse
from trilemma.data import IGNORE, Batch, Dataset, Tokenizer, prepare
from trilemma.data.subwords import SubwordDropout
from trilemma.decode.prompts import Prompts
from trilemma.errors import CapabilityError, ConfigError, DataError, LengthError

BYTE = {"kind": "byte"}
NUMBERS = {"train": {"generated": "numbers", "size": 300, "options": {"limit": 1000}}}


def config(layout: str, data: dict[str, Any], tokenizer: dict[str, Any] | None = None, **training: Any) -> RunConfig:
    values = {"model": {"layout": layout}, "data": data, "tokenizer": tokenizer or BYTE, "training": training}
    return parse(RunConfig, values)


def lines(path: Path, texts: list[str]) -> str:
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return str(path)


def stripped(ids: Tensor) -> list[int]:
    return [int(index) for index in ids]


def test_encoder_decoder_rows(tmp_path: Path) -> None:
    dataset, tokenizer = prepare(config("encoder-decoder", NUMBERS, batch_tokens=800), cache_dir=tmp_path)
    pairs = dict(zip(*dataset.eval_texts("test"), strict=True))
    seen = 0
    for batch in dataset.eval_batches("test"):
        assert batch.source is not None and batch.source_lengths is not None
        assert batch.inputs.dtype == batch.labels.dtype == batch.lengths.dtype == torch.int64
        for row in range(len(batch.inputs)):
            size, source_size = int(batch.lengths[row]), int(batch.source_lengths[row])
            source, inputs = stripped(batch.source[row]), stripped(batch.inputs[row])
            target = tokenizer.encode(pairs[tokenizer.decode(source)])
            assert source[source_size - 1] == tokenizer.eos and set(source[source_size:]) <= {tokenizer.pad}
            assert inputs[:size] == [tokenizer.bos, *target] and set(inputs[size:]) <= {tokenizer.pad}
            assert stripped(batch.labels[row]) == [*target, tokenizer.eos] + [IGNORE] * (len(inputs) - size)
            seen += 1
        assert batch.num_targets == int((batch.labels != IGNORE).sum())
        assert batch.num_tokens == int(batch.lengths.sum() + batch.source_lengths.sum())
    assert seen == len(pairs) == dataset.sizes["test"]


def test_concatenated_rows(tmp_path: Path) -> None:
    dataset, tokenizer = prepare(config("decoder-only", NUMBERS, batch_tokens=800), cache_dir=tmp_path)
    pairs = dict(zip(*dataset.eval_texts("valid"), strict=True))
    for batch in dataset.eval_batches("valid"):
        assert batch.prefix is not None and batch.source is None
        for row in range(len(batch.inputs)):
            size, prefix = int(batch.lengths[row]), int(batch.prefix[row])
            inputs, labels = stripped(batch.inputs[row])[:size], stripped(batch.labels[row])
            source = tokenizer.decode(inputs[:prefix])
            target = tokenizer.encode(pairs[source])
            assert inputs == [tokenizer.bos, *tokenizer.encode(source), tokenizer.sep, *target]
            assert inputs[prefix - 1] == tokenizer.sep and labels[prefix - 1] == target[0]
            assert labels[prefix - 1 : size] == [*target, tokenizer.eos]
            assert set(labels[: prefix - 1] + labels[size:]) <= {IGNORE}


def test_prompts_are_what_training_saw(tmp_path: Path) -> None:
    for layout in ("encoder-decoder", "decoder-only"):
        dataset, tokenizer = prepare(config(layout, NUMBERS), cache_dir=tmp_path)
        batch = next(dataset.eval_batches("valid"))
        source = batch.inputs if batch.source is None else batch.source
        text = tokenizer.decode(source[0, : prefix_of(batch)].tolist())
        request = Prompts(tokenizer, dataset.config).context(tokenizer.encode(text))
        if batch.source is not None and batch.source_lengths is not None:
            assert request.source == stripped(batch.source[0, : int(batch.source_lengths[0])])
        assert request.prompt == stripped(batch.inputs[0, : len(request.prompt)])
        assert batch.prefix is None or len(request.prompt) == int(batch.prefix[0])


def prefix_of(batch: Batch) -> int | None:
    return None if batch.prefix is None else int(batch.prefix[0])


def test_all_layouts_see_the_same_order(tmp_path: Path) -> None:
    hashes = set()
    for layout in ("encoder-decoder", "decoder-only"):
        dataset, _ = prepare(config(layout, NUMBERS, batch_tokens=1000), cache_dir=tmp_path)
        hashes.add((dataset.order_hash(40), dataset.data_hash))
        assert [dataset.micro_batch(k).examples for k in (3, 1)] == [dataset.micro_batch(k).examples for k in (3, 1)]
    assert len(hashes) == 1
    other, _ = prepare(config("decoder-only", NUMBERS, batch_tokens=900), cache_dir=tmp_path)
    assert other.order_hash(40) != dataset.order_hash(40) and other.data_hash == dataset.data_hash


@pytest.mark.parametrize("layout", ["encoder-decoder", "decoder-only"])
def test_micro_batches_in_any_order_and_within_the_budget(tmp_path: Path, layout: str) -> None:
    settings = config(layout, NUMBERS, batch_tokens=700)
    dataset, _ = prepare(settings, cache_dir=tmp_path)
    again, _ = prepare(settings, cache_dir=tmp_path)
    order = list(range(2 * dataset.batches_per_epoch))
    batches = {k: dataset.micro_batch(k) for k in order}
    random.shuffle(order)
    for k in order:
        other = again.micro_batch(k)
        assert torch.equal(batches[k].inputs, other.inputs) and torch.equal(batches[k].labels, other.labels)
        padded = other.inputs.numel() + (0 if other.source is None else other.source.numel())
        assert padded <= 700 and other.index == k
    epoch = [e for k in range(dataset.batches_per_epoch) for e in batches[k].examples]
    assert sorted(epoch) == list(range(300))


def stream(tmp_path: Path, documents: list[str], **data: Any) -> tuple[Dataset, Tokenizer]:
    path = lines(tmp_path / "train.txt", documents)
    values = {"task": "language-model", "train": {"path": path}, "valid": {"path": path}, "context_length": 16, **data}
    return prepare(config("decoder-only", values, batch_tokens=64), cache_dir=tmp_path / "cache")


DOCUMENTS = ["first document", "", "a", "the third one is rather longer than a row of sixteen bytes", "é" * 9]


def test_packed_rows_hold_whole_documents_between_boundaries(tmp_path: Path) -> None:
    dataset, tokenizer = stream(tmp_path, DOCUMENTS)
    joined: list[int] = []
    for batch in dataset.eval_batches("valid"):
        assert batch.segments is not None and batch.inputs.shape[1] <= 16
        for inputs, labels, segments, size in zip(
            batch.inputs, batch.labels, batch.segments, batch.lengths, strict=True
        ):
            assert (segments[size:] == -1).all() and (labels[size:] == IGNORE).all()
            assert stripped(segments[:size].unique()) == list(range(int(segments[size - 1]) + 1))
            for place in range(1, int(size)):
                if segments[place] == segments[place - 1]:
                    assert labels[place - 1] == inputs[place]  # labels are the inputs one step on
                else:
                    assert inputs[place] == tokenizer.bos and labels[place - 1] == tokenizer.eos
            joined += stripped(labels[:size])
    expected = [index for text in DOCUMENTS for index in [*tokenizer.encode(text), tokenizer.eos]]
    assert joined == expected  # every byte of every document is scored once
    assert dataset.targets_of("valid") == len(expected)
    assert dataset.bytes_of("valid") == len("".join(text + "\n" for text in DOCUMENTS).encode())
    assert dataset.eval_texts("valid") == (DOCUMENTS, [])
    assert "data.empty.train.text" in dataset.notes


def test_a_sample_of_the_batches_is_the_same_every_time(tmp_path: Path) -> None:
    dataset, _ = stream(tmp_path, [f"document number {number}" for number in range(40)])
    everything = [batch.inputs for batch in dataset.eval_batches("valid")]
    assert len(everything) > 9
    for most, kept in ((1, 1), (64, 1), (3 * 64 + 5, 3), (10**6, len(everything))):
        sample = [batch.inputs for batch in dataset.eval_batches("valid", most)]
        wanted = [everything[place * len(everything) // kept] for place in range(kept)]
        assert all(torch.equal(one, two) for one, two in zip(sample, wanted, strict=True))


def test_one_continuous_stream(tmp_path: Path) -> None:
    dataset, tokenizer = stream(tmp_path, DOCUMENTS, packing=False)
    text = "".join(document + "\n" for document in DOCUMENTS)
    batches = list(dataset.eval_batches("valid"))
    assert all(batch.segments is None for batch in batches)
    inputs = [i for batch in batches for row, n in zip(batch.inputs, batch.lengths, strict=True) for i in row[:n]]
    labels = [i for batch in batches for row, n in zip(batch.labels, batch.lengths, strict=True) for i in row[:n]]
    assert stripped(torch.stack(inputs)) == [tokenizer.bos, *tokenizer.encode(text)]
    assert stripped(torch.stack(labels)) == [*tokenizer.encode(text), tokenizer.eos]
    assert dataset.targets_of("valid") == len(labels)
    assert dataset.bytes_of("valid") == len(text.encode()) and dataset.sizes["train"] == 1
    full = [dataset.micro_batch(k) for k in range(dataset.batches_per_epoch)]
    assert sum(batch.num_targets for batch in full) == len(labels)


def test_masking_is_a_function_of_seed_and_batch(tmp_path: Path) -> None:
    path = lines(tmp_path / "train.txt", ["the quick brown fox jumps over the lazy dog " * 5] * 40)
    values = {"task": "masked-language-model", "train": {"path": path}, "context_length": 64}
    settings = config("encoder-only", values, batch_tokens=2048)
    dataset, tokenizer = prepare(settings, cache_dir=tmp_path)
    kept = masked = changed = total = 0
    for k in range(6):
        batch, again = dataset.micro_batch(k), dataset.micro_batch(k)
        assert torch.equal(batch.inputs, again.inputs) and torch.equal(batch.labels, again.labels)
        chosen = batch.labels != IGNORE
        assert not torch.isin(batch.labels[chosen], torch.tensor(sorted(tokenizer.special_ids))).any()
        masked += int((batch.inputs[chosen] == tokenizer.mask).sum())
        kept += int((batch.inputs[chosen] == batch.labels[chosen]).sum())
        changed += batch.num_targets
        total += batch.num_tokens
        assert (batch.inputs[~chosen] != tokenizer.mask).all() and batch.num_targets == int(chosen.sum())
    assert abs(changed / total - 0.15) < 0.02
    assert abs(masked / changed - 0.8) < 0.05 and abs(kept / changed - 0.1) < 0.05
    other, _ = prepare(settings.model_copy(update={"seed": 9}), cache_dir=tmp_path)
    assert not torch.equal(other.micro_batch(0).inputs, dataset.micro_batch(0).inputs)


def test_classification(tmp_path: Path) -> None:
    train = lines(tmp_path / "train.tsv", ["good film\t10", "bad film\t2", "fine\t10"])
    values = {"task": "classification", "train": {"path": train}, "valid": {"path": train}}
    settings = config("encoder-only", values)
    dataset, tokenizer = prepare(settings, cache_dir=tmp_path)
    assert dataset.label_names == ["2", "10"]  # as numbers
    (batch,) = dataset.eval_batches("valid")
    assert batch.labels.shape == (3,) and batch.num_targets == 3
    for row, example in enumerate(batch.examples):
        text, label = (column[example] for column in dataset.eval_texts("valid"))
        ids = stripped(batch.inputs[row, : int(batch.lengths[row])])
        assert ids == [tokenizer.bos, *tokenizer.encode(text), tokenizer.eos]
        assert dataset.label_names[int(batch.labels[row])] == label
    resolved = dataset.resolved(settings)
    assert (resolved.model.num_labels, resolved.data.labels) == (2, ["2", "10"])
    valid = {"valid": {"path": lines(tmp_path / "valid.tsv", ["x\t3"])}}
    with pytest.raises(DataError, match='the label "3" does not occur in the training data'):
        prepare(config("encoder-only", {**values, **valid}), cache_dir=tmp_path)


def test_iterables_of_every_kind(tmp_path: Path) -> None:
    settings = config("encoder-decoder", {})
    pairs = [("a b", "c"), ("d\n", "é"), ("", "x")]
    items = {"train": (pair for pair in pairs), "valid": [{"source": a, "target": b} for a, b in pairs]}
    dataset, _ = prepare(settings, cache_dir=tmp_path, data=items)
    assert dataset.sizes == {"train": 3, "valid": 3}
    assert list(zip(*dataset.eval_texts("valid"), strict=True)) == pairs
    assert dataset.data_hash == prepare(settings, cache_dir=tmp_path, data={**items, "train": pairs})[0].data_hash
    with pytest.raises(DataError, match=r"there is no test data: set data\.test"):
        next(dataset.eval_batches("test"))
    with pytest.raises(DataError, match="the train iterable is empty"):
        prepare(settings, cache_dir=tmp_path, data=[])
    with pytest.raises(DataError, match=r"data\[train\] item 2: seq2seq needs"):
        prepare(settings, cache_dir=tmp_path, data=[("a", "b"), "c"])
    with pytest.raises(ConfigError, match='unknown split "validation"'):
        prepare(settings, cache_dir=tmp_path, data={"validation": []})


def test_lowercase_holds_for_text_references_and_prompts(tmp_path: Path) -> None:
    settings = config("encoder-decoder", {"lowercase": True}, {"kind": "bpe", "vocab_size": 300})
    dataset, tokenizer = prepare(settings, cache_dir=tmp_path, data={"train": [("ÄB", "CD")], "valid": [("ÄB", "CD")]})
    assert dataset.eval_texts("valid") == (["äb"], ["cd"]) and "data.lowercase" in dataset.notes
    assert tokenizer.encode("ÄB") == tokenizer.encode("äb")


LONG = [("short", "short"), ("x" * 30, "y"), ("x", "y" * 40), ("", "")]


def test_examples_over_the_limits_are_an_error_or_counted(tmp_path: Path) -> None:
    path = lines(tmp_path / "t.tsv", ["\t".join(pair) for pair in LONG])
    data = {"train": {"path": path}, "valid": {"path": path}, "max_source_length": 29, "max_target_length": 39}
    message = r"t.tsv:2 is over the limits \(30 source tokens, 1 target tokens; .* as are 1 more of 4"
    with pytest.raises(DataError, match=message):
        prepare(config("encoder-decoder", data), cache_dir=tmp_path)
    dataset, _ = prepare(config("encoder-decoder", {**data, "over_length": "drop"}), cache_dir=tmp_path)
    assert dataset.dropped == 2 and dataset.notes["data.dropped"].startswith("2 of 4")
    assert dataset.notes["data.empty.train.source"].startswith("1 empty line")
    seen = {e for k in range(dataset.batches_per_epoch) for e in dataset.micro_batch(k).examples}
    assert seen == {0, 3}
    assert sum(len(batch.inputs) for batch in dataset.eval_batches("valid")) == 4  # evaluation drops nothing


def test_settings_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(CapabilityError, match=r"language-model needs model\.layout decoder-only, not encoder-only"):
        prepare(config("encoder-only", {"task": "language-model"}), cache_dir=tmp_path)
    with pytest.raises(ConfigError, match="batch_tokens: 20 is too small: the longest training example has"):
        prepare(config("encoder-decoder", NUMBERS, batch_tokens=20), cache_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"batch_tokens: 20 is below data\.context_length"):
        prepare(config("decoder-only", {**NUMBERS, "task": "language-model"}, batch_tokens=20), cache_dir=tmp_path)
    dataset, tokenizer = prepare(config("encoder-decoder", NUMBERS), cache_dir=tmp_path)
    resolved = dataset.resolved(dataset.config)
    assert resolved.model.vocab_size == tokenizer.vocab_size == 262
    small = resolved.model_copy(update={"model": resolved.model.model_copy(update={"vocab_size": 100})})
    with pytest.raises(ConfigError, match=r"model\.vocab_size: 100 is too small: the data have 262"):
        dataset.resolved(small)
    assert dataset.resolved(resolved) == resolved


def test_a_mixture_sees_its_parts_by_weight(tmp_path: Path) -> None:
    rare = lines(tmp_path / "rare.tsv", [f"r{i}\tx" for i in range(10)])
    much = lines(tmp_path / "much.tsv", [f"m{i}\tx" for i in range(40)])
    train = [{"path": rare, "weight": 3}, {"path": much, "weight": 0.5}]
    dataset, tokenizer = prepare(config("encoder-decoder", {"train": train}, batch_tokens=60), cache_dir=tmp_path)
    texts = []
    for k in range(dataset.batches_per_epoch):
        source = dataset.micro_batch(k).source
        assert source is not None
        texts += [tokenizer.decode(row.tolist()) for row in source]
    assert sorted(t for t in texts if t[0] == "r") == sorted(3 * [f"r{i}" for i in range(10)])
    assert len({t for t in texts if t[0] == "m"}) == 20 == len([t for t in texts if t[0] == "m"])


DROPOUT = {"subword_dropout": 0.3, "subword_copies": 3, "batch_tokens": 800}
BPE = {"kind": "bpe", "vocab_size": 320}


def rows(dataset: Dataset, epoch: int) -> dict[int, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Source and target ids of each example, as an epoch reads them."""
    found = {}
    for k in range(epoch * dataset.batches_per_epoch, (epoch + 1) * dataset.batches_per_epoch):
        batch = dataset.micro_batch(k)
        assert batch.source is not None and batch.source_lengths is not None
        for row, example in enumerate(batch.examples):
            source = batch.source[row, : int(batch.source_lengths[row]) - 1]
            found[example] = (tuple(source.tolist()), tuple(batch.inputs[row, 1 : int(batch.lengths[row])].tolist()))
    return found


def test_epochs_read_other_segmentations_of_the_same_text_in_turn(tmp_path: Path) -> None:
    plain, tokenizer = prepare(config("encoder-decoder", NUMBERS, BPE, batch_tokens=800), cache_dir=tmp_path)
    dropped, _ = prepare(config("encoder-decoder", NUMBERS, BPE, **DROPOUT), cache_dir=tmp_path)
    epochs = [rows(dropped, epoch) for epoch in range(7)]
    texts = {example: tuple(map(tokenizer.decode, pair)) for example, pair in rows(plain, 0).items()}
    for found in epochs:
        assert {example: tuple(map(tokenizer.decode, pair)) for example, pair in found.items()} == texts
    assert epochs[0] == epochs[3] == epochs[6] and epochs[1] == epochs[4] and epochs[2] == epochs[5]
    for one, two in ((0, 1), (1, 2), (0, 2)):
        differing = sum(epochs[one][example] != epochs[two][example] for example in texts)
        assert differing > 0.9 * len(texts)
    assert "3 segmentations of the training text" in dropped.notes["data.copies"]


def test_subword_dropout_changes_neither_order_nor_evaluation(tmp_path: Path) -> None:
    plain, _ = prepare(config("encoder-decoder", NUMBERS, BPE, batch_tokens=800), cache_dir=tmp_path)
    dropped, _ = prepare(config("encoder-decoder", NUMBERS, BPE, **DROPOUT), cache_dir=tmp_path)
    assert dropped.order_hash(50) == plain.order_hash(50)
    assert dropped.data_hash != plain.data_hash
    for split in ("valid", "test"):
        for one, two in zip(dropped.eval_batches(split), plain.eval_batches(split), strict=True):  # type: ignore[arg-type]
            assert torch.equal(one.inputs, two.inputs)
    late = dropped.micro_batch(200)
    again, _ = prepare(config("encoder-decoder", NUMBERS, BPE, **DROPOUT), cache_dir=tmp_path)
    assert again.data_hash == dropped.data_hash
    assert torch.equal(again.micro_batch(200).inputs, late.inputs)


def test_copies_are_found_in_the_cache_and_made_again_for_another_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seed has no part in them: runs of a study share them."""
    first = config("encoder-decoder", NUMBERS, BPE, **DROPOUT)
    dataset, _ = prepare(first, cache_dir=tmp_path)
    monkeypatch.setattr(SubwordDropout, "encode", None)
    again, _ = prepare(first.model_copy(update={"seed": 9}), cache_dir=tmp_path)
    assert again.data_hash == dataset.data_hash
    for change in ({"subword_dropout": 0.2}, {"subword_copies": 4}):
        with pytest.raises(TypeError):
            prepare(config("encoder-decoder", NUMBERS, BPE, **{**DROPOUT, **change}), cache_dir=tmp_path)


def test_labels_are_no_subwords(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "a.tsv", [f"number {number} is small\t{'yes' if number < 50 else 'no'}" for number in range(99)]
    )
    data = {"task": "classification", "train": {"path": path}}
    dataset, tokenizer = prepare(config("encoder-only", data, BPE, **DROPOUT), cache_dir=tmp_path / "cache")
    for k in range(3 * dataset.batches_per_epoch):
        batch = dataset.micro_batch(k)
        for row, example in enumerate(batch.examples):
            assert tokenizer.decode(batch.inputs[row].tolist()) == f"number {example} is small"
            assert dataset.label_names is not None
            assert dataset.label_names[int(batch.labels[row])] == ("yes" if example < 50 else "no")


@pytest.mark.parametrize(
    ("layout", "data", "tokenizer", "message"),
    [
        ("decoder-only", {"task": "language-model"}, BPE, "seq2seq and classification, not language-model"),
        ("encoder-decoder", {}, {"kind": "unigram", "vocab_size": 320}, r"set tokenizer\.kind=bpe"),
        ("encoder-decoder", {}, BYTE, r"set tokenizer\.kind=bpe"),
    ],
)
def test_where_there_are_no_subwords_to_drop(
    tmp_path: Path, layout: str, data: dict[str, Any], tokenizer: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(config(layout, {**NUMBERS, **data}, tokenizer, **DROPOUT), cache_dir=tmp_path)


@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize(("layout", "longest"), [("encoder-decoder", 8), ("decoder-only", 12)])
def test_what_is_longer_than_the_positions_is_named_beforehand(
    tmp_path: Path, layout: str, longest: int, split: str
) -> None:
    data: dict[str, Any] = {}
    for name in ("train", "valid", "test"):
        long = "1234567" if name == split else "1234"  # and a special token; for a language model those of both sides
        sources = lines(tmp_path / f"{name}.a", ["12", long, "1"])
        data[name] = {"source": sources, "target": lines(tmp_path / f"{name}.b", ["ab", "abc", ""])}
    for positions in (longest - 1, longest):
        wanted = config(layout, data)
        wanted = wanted.model_copy(update={"model": wanted.model.model_copy(update={"max_length": positions})})
        dataset, _ = prepare(wanted, cache_dir=tmp_path / "cache")
        if positions == longest:
            dataset.check_positions()
            continue
        place = r"train\.a:2" if split == "train" else f"data.{split}, example 2"
        with pytest.raises(LengthError, match=f"{place}: {longest} tokens, special ones counted, are more than"):
            dataset.check_positions()


def test_training_examples_that_are_left_out_need_no_positions(tmp_path: Path) -> None:
    train = {"source": lines(tmp_path / "a", ["12", "1234567"]), "target": lines(tmp_path / "b", ["a", "b"])}
    data = {"train": train, "max_source_length": 5, "over_length": "drop"}
    wanted = config("encoder-decoder", data)
    wanted = wanted.model_copy(update={"model": wanted.model.model_copy(update={"max_length": 6})})
    dataset, _ = prepare(wanted, cache_dir=tmp_path / "cache")
    dataset.check_positions()
    assert dataset.dropped == 1


def test_rows_of_a_stream_fit_the_positions(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.txt", ["some text"] * 9)
    wanted = config("decoder-only", {"task": "language-model", "train": {"path": path}, "context_length": 16})
    wanted = wanted.model_copy(update={"model": wanted.model.model_copy(update={"max_length": 15})})
    dataset, _ = prepare(wanted, cache_dir=tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"data\.context_length: 16 is more than model\.max_length 15"):
        dataset.check_positions()


def test_a_header_counts_as_a_line(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text("source\ttarget\na\tb\nlonger\tb\n")
    data = {"train": {"path": str(path), "options": {"header": True}}, "max_source_length": 3}
    with pytest.raises(DataError, match=r"pairs\.tsv:3 is over the limits"):
        prepare(config("encoder-decoder", data), cache_dir=tmp_path / "cache")


def test_under_a_split_examples_are_counted_not_lines(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"{'x' * (index % 9)}{index}\tb{index}\n" for index in range(200)))
    data = {"train": {"path": str(path)}, "split": {"valid": 0.2, "test": 0.2}, "max_source_length": 3}
    with pytest.raises(DataError, match=r"pairs\.tsv \(train\), example \d+ is over the limits"):
        prepare(config("encoder-decoder", data), cache_dir=tmp_path / "cache")


def test_a_vocabulary_that_was_rounded_up_writes_no_token_without_text(tmp_path: Path) -> None:
    wanted = config("encoder-decoder", NUMBERS)
    dataset, tokenizer = prepare(wanted, cache_dir=tmp_path)
    sizes = {size: wanted.model.model_copy(update={"vocab_size": tokenizer.vocab_size + size}) for size in (0, 3, 1025)}
    banned = [tokenizer.vocab_size + place for place in range(3)]
    assert not dataset.resolved(wanted.model_copy(update={"model": sizes[0]})).decoding.banned
    found = dataset.resolved(wanted.model_copy(update={"model": sizes[3]}))
    assert (found.decoding.banned, found.model.vocab_size) == (banned, sizes[3].vocab_size)
    assert "which the tokenizer has no text for" in found.notes["decoding.banned"]
    assert dataset.resolved(found).decoding.banned == banned
    with pytest.raises(ConfigError, match=r"model\.vocab_size: \d+ is more than 1,024 above the tokenizer's"):
        dataset.resolved(wanted.model_copy(update={"model": sizes[1025]}))


def test_characters_that_the_tokenizer_does_not_know_are_counted(tmp_path: Path) -> None:
    train = {"source": lines(tmp_path / "a", ["ab", "ba"]), "target": lines(tmp_path / "b", ["x", "y"])}
    valid = {"source": lines(tmp_path / "va", ["a\u2603b\u2603", "ab"]), "target": lines(tmp_path / "vb", ["x", "y"])}
    dataset, _ = prepare(config("encoder-decoder", {"train": train, "valid": valid}, {"kind": "character"}))
    notes = {key: note for key, note in dataset.notes.items() if key.startswith("data.unknown")}
    assert notes == {
        "data.unknown.valid.source": "2 token(s) that the tokenizer does not know, read as its unknown token"
    }
