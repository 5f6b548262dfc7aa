"""`data.split` and `data.overlap`: no sentence of valid or test in train, on either side, on every path."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from trilemma.config import RunConfig, load_config, merge, parse
from trilemma.data import Dataset, prepare
from trilemma.errors import ConfigError, DataError
from trilemma.measure.texts import split_texts

SPLITS = ("train", "valid", "test")
Pairs = list[tuple[str, str]]


def some_pairs(count: int = 600) -> Pairs:
    """Sources with several translations, translations of several sources, other cases and spaces."""
    draw = random.Random(7)
    pairs = [(f"source {draw.randrange(count // 2)}", f"ziel {draw.randrange(count // 2)}") for _ in range(count)]
    pairs += [("Source 1", "ZIEL  2"), (" source  1 ", "ganz anderes"), ("", "leer"), ("leer", "")]
    return pairs


def write(path: Path, pairs: Pairs) -> Path:
    path.write_text("".join(f"{source}\t{target}\n" for source, target in pairs))
    return path


def config_of(path: Path, **data: Any) -> RunConfig:
    values = {
        "model": {"d_model": 8, "num_heads": 1, "num_layers": 1},
        "data": {"task": "seq2seq", "train": {"path": str(path)}, **data},
        "tokenizer": {"kind": "byte"},
    }
    return parse(RunConfig, values)


def texts_of(dataset: Dataset) -> dict[str, Pairs]:
    """All pairs of all splits, from the token ids."""
    decode = dataset.tokenizer.decode
    found = {}
    for split in dataset.sizes:
        sides = [
            [decode(store.ids(name, row)) for store in dataset.stores[split] for row in range(store.size)]
            for name in ("source", "target")
        ]
        found[split] = list(zip(*sides, strict=True))
    return found


def sentences(pairs: Pairs, side: int) -> set[str]:
    return {" ".join(pair[side].casefold().split()) for pair in pairs} - {""}


def assert_no_leak(found: dict[str, Pairs]) -> None:
    for one, other in itertools.combinations(found, 2):
        for side in (0, 1):
            assert not sentences(found[one], side) & sentences(found[other], side), (one, other, side)


def test_no_sentence_stands_in_two_splits(tmp_path: Path) -> None:
    pairs = some_pairs()
    config = config_of(write(tmp_path / "a.tsv", pairs), split={"valid": 0.1, "test": 0.15})
    dataset, _ = prepare(config, cache_dir=tmp_path)
    found = texts_of(dataset)
    assert list(found) == list(SPLITS)
    assert_no_leak(found)
    everything = Counter(pairs)
    assert all(count <= everything[pair] for pair, count in Counter(itertools.chain(*found.values())).items())
    assert 0.08 < len(found["test"]) / len(pairs) < 0.25
    assert len(found["train"]) > 0.4 * len(pairs)
    left_out = len(pairs) - sum(map(len, found.values()))
    assert left_out > 0, "the example is too easy"
    note = dataset.notes["data.split"]
    assert note.startswith(f"train {len(found['train']):,} (")
    assert sum(int(part.partition("(")[2].split(" left")[0]) for part in note.split("; ") if "left" in part) == left_out


def test_a_split_by_lines_would_leak(tmp_path: Path) -> None:
    """The planted defect: the check above can fail."""
    pairs = some_pairs()
    with pytest.raises(AssertionError):
        assert_no_leak({"train": pairs[100:], "test": pairs[:100]})


def test_a_split_depends_on_the_sentence_alone(tmp_path: Path) -> None:
    """Order, file format, seed and what else the files hold decide nothing: what was test stays test."""
    pairs = some_pairs()
    options: dict[str, Any] = {"split": {"test": 0.2}}
    first = texts_of(prepare(config_of(write(tmp_path / "a.tsv", pairs), **options), cache_dir=tmp_path)[0])
    records = [json.dumps({"source": source, "target": target}) for source, target in reversed(pairs)]
    (tmp_path / "b.jsonl").write_text("\n".join(records) + "\n")
    config = config_of(tmp_path / "b.jsonl", **options).model_copy(update={"seed": 9})
    second = texts_of(prepare(config, cache_dir=tmp_path)[0])
    assert {split: sorted(rows) for split, rows in second.items()} == {s: sorted(rows) for s, rows in first.items()}
    more = [*pairs, *((f"new {number}", f"neu {number}") for number in range(50))]
    third = texts_of(prepare(config_of(write(tmp_path / "c.tsv", more), **options), cache_dir=tmp_path)[0])
    assert set(first["test"]) <= set(third["test"])
    assert set(first["train"]) <= set(third["train"])


def test_several_sources_are_divided_together(tmp_path: Path) -> None:
    pairs = some_pairs()
    one, two = write(tmp_path / "one.tsv", pairs[:300]), write(tmp_path / "two.tsv", pairs[300:])
    sources = [{"path": str(one), "weight": 2}, {"path": str(two)}]
    config = config_of(one, split={"valid": 0.1, "test": 0.1})
    config = parse(RunConfig, merge(config.model_dump(mode="json"), {"data": {"train": sources}}))
    assert_no_leak(texts_of(prepare(config, cache_dir=tmp_path)[0]))


def test_evaluation_reads_the_same_lines(tmp_path: Path) -> None:
    """`trilemma evaluate` reads them without preparing the training data."""
    config = config_of(write(tmp_path / "a.tsv", some_pairs()), split={"valid": 0.1, "test": 0.1})
    dataset, _ = prepare(config, cache_dir=tmp_path)
    for split in ("valid", "test"):
        texts = split_texts(config, split)  # type: ignore[arg-type]
        assert (texts.sources, texts.targets) == dataset.eval_texts(split)  # type: ignore[arg-type]


def test_lines_of_a_language_model_and_labels(tmp_path: Path) -> None:
    lines = [f"line {number % 90}" for number in range(300)]
    (tmp_path / "a.txt").write_text("\n".join(lines) + "\n")
    text: dict[str, Any] = {"task": "language-model", "train": {"path": str(tmp_path / "a.txt")}, "context_length": 16}
    config = parse(RunConfig, {
        "model": {"layout": "decoder-only", "d_model": 8, "num_heads": 1, "num_layers": 1},
        "data": {**text, "split": {"valid": 0.2, "test": 0.2}}, "tokenizer": {"kind": "byte"},
    })  # fmt: skip
    dataset, _ = prepare(config, cache_dir=tmp_path)
    valid, test = (set(dataset.eval_texts(split)[0]) for split in ("valid", "test"))  # type: ignore[arg-type]
    assert valid
    assert test
    assert not valid & test
    assert split_texts(config, "test").line_ends == dataset.sizes["test"]
    assert sum(dataset.sizes.values()) == 300
    rows: Pairs = [(f"text {number}", ("yes", "no")[number % 2]) for number in range(100)]
    labels = write(tmp_path / "c.tsv", rows)
    labelled = parse(RunConfig, {
        "model": {"layout": "encoder-only", "d_model": 8, "num_heads": 1, "num_layers": 1},
        "data": {"task": "classification", "train": {"path": str(labels)}, "split": {"test": 0.2}},
        "tokenizer": {"kind": "byte"},
    })  # fmt: skip
    found, _ = prepare(labelled, cache_dir=tmp_path)
    assert sum(found.sizes.values()) == 100, "a label is no side: nothing is left out"


def test_blank_lines_are_for_training(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {number}\n\n" for number in range(400)))
    config = config_of(path, task="language-model", context_length=32, split={"valid": 0.05, "test": 0.1})
    config = config.model_copy(update={"model": config.model.model_copy(update={"layout": "decoder-only"})})
    for split in ("valid", "test"):
        assert all(split_texts(config, split).sources)


def test_pairs_left_out_may_leave_nothing(tmp_path: Path) -> None:
    shares = {"valid": 0.1, "test": 0.1}
    dataset, _ = prepare(config_of(write(tmp_path / "a.tsv", some_pairs()), split=shares), cache_dir=tmp_path / "c")
    kept = texts_of(dataset)
    (stronger, _), *_ = kept["test"]
    hidden = [
        (stronger, "x"),
        *((source, kept["test"][0][1]) for source, _ in kept["valid"]),
        *kept["test"],
        *kept["train"],
    ]
    with pytest.raises(DataError, match="no example is left for valid"):
        prepare(config_of(write(tmp_path / "b.tsv", hidden), split=shares), cache_dir=tmp_path / "c")


@pytest.mark.parametrize("overlap", ["keep", "drop"])
def test_overlap_with_given_files(tmp_path: Path, overlap: str) -> None:
    train = [("a", "1"), ("b", "2"), ("C", "3"), ("d", "4"), ("", "5"), ("e", "")]
    paths = {
        "train": write(tmp_path / "train.tsv", train),
        "valid": write(tmp_path / "valid.tsv", [("b", "9"), ("", "8")]),
        "test": write(tmp_path / "test.tsv", [("x", "4"), (" c ", "7")]),
    }
    files = {split: {"path": str(path)} for split, path in paths.items() if split != "train"}
    config = config_of(paths["train"], overlap=overlap, **files)
    dataset, _ = prepare(config, cache_dir=tmp_path)
    found = texts_of(dataset)
    assert found["train"] == ([("a", "1"), ("", "5"), ("e", "")] if overlap == "drop" else train)
    assert (len(found["valid"]), len(found["test"])) == (2, 2)
    assert ("data.overlap" in dataset.notes) == (overlap == "drop")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"split": {"valid": 0.6, "test": 0.6}}, "together above 0 and below 1"),
        ({"split": {}}, "together above 0 and below 1"),
        ({"split": {"tset": 0.1}}, 'unknown key "data.split.tset"; did you mean "test"'),
        ({"split": 0.1}, "data.split: a mapping is needed"),
        ({"split": {"test": 0.1}, "test": {"path": "x.tsv"}}, "leave out data.valid and data.test"),
        ({"split": {"test": 0.1}, "train": {"generated": "copy"}}, "generated tasks have disjoint splits of their own"),
        ({"overlap": "dorp"}, "data.overlap"),
    ],
)
def test_what_cannot_be_divided_is_refused(tmp_path: Path, data: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "a.tsv", some_pairs(20))
    with pytest.raises(ConfigError) as error:
        prepare(config_of(path, **{"train": {"path": str(path)}, **data}), cache_dir=tmp_path)
    assert message in str(error.value)


def test_a_split_of_nothing_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", [("a", "1"), ("b", "2")])
    with pytest.raises(DataError, match="of 2 examples none falls to test; give it a larger share"):
        prepare(config_of(path, split={"test": 0.001}), cache_dir=tmp_path)
    with pytest.raises(DataError, match=r"there is no valid data: set data\.split\.valid"):
        split_texts(config_of(path, split={"test": 0.5}), "valid")


def test_long_documents_are_not_compared(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    values = {"task": "language-model", "train": {"path": str(tmp_path / "a.txt"), "options": {"documents": "blank"}}}
    config = parse(RunConfig, {"model": {"layout": "decoder-only"}, "data": {**values, "split": {"test": 0.5}}})
    with pytest.raises(ConfigError, match="documents must be lines"):
        prepare(config, cache_dir=tmp_path)


@pytest.mark.data
@pytest.mark.parametrize("recipe", ["tatoeba-en-zh"])
def test_the_real_files_are_divided_without_leaks(recipe: str, tmp_path: Path) -> None:
    config = load_config(Path(__file__).parents[2] / "recipes" / f"{recipe}.yaml", ["tokenizer.kind=byte"])
    assert not isinstance(config.data.train, list)
    if not Path(str(config.data.train.path)).exists():
        pytest.skip(f"the published set {config.data.train.path} is not beside this checkout")
    dataset, _ = prepare(config, cache_dir=tmp_path)
    assert_no_leak(texts_of(dataset))
    assert dataset.sizes["train"] > 27_000
    assert min(dataset.sizes["valid"], dataset.sizes["test"]) > 300
