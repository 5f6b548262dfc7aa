"""Tokenizers of imported directories without tokenizer.json: SentencePiece's, and Marian's two with one vocabulary."""

from __future__ import annotations

import io
import json
import warnings
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import transformers
from hf_models import CASES, EOS, PAD, VOCABULARY, make

from trilemma import load
from trilemma.data import Tokenizer
from trilemma.errors import CapabilityError, CheckpointError, DataError
from trilemma.interop import export_ctranslate2, export_onnx, export_torch, import_model
from trilemma.interop.export_hf import write
from trilemma.interop.target import ExportOptions
from trilemma.runs.load import load_run

sentencepiece = pytest.importorskip("sentencepiece")

ENGLISH = ["the house is small", "a small tree stands there", "the trees are tall", "his house has a tall door"] * 4
GERMAN = ["das Haus ist klein", "dort steht ein kleiner Baum", "die Bäume sind hoch", "sein Haus hat eine Tür"] * 4


def trained(texts: list[str], size: int) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=size,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=2,
        unk_id=3,
        bos_id=1,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def marian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Marian model whose sides are split by their own models."""
    folder = tmp_path_factory.mktemp("marian")
    models = [trained(texts, 46) for texts in (ENGLISH, GERMAN)]
    pieces = ["<pad>", ">>deu<<", "</s>", "<unk>"]
    for side, model in zip(("source", "target"), models, strict=True):
        (folder / f"{side}.spm").write_bytes(model)
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        pieces += [processor.id_to_piece(index) for index in range(4, processor.get_piece_size())]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    size = len(vocabulary)
    make(replace(CASES["marian"], banned=()), folder, vocab_size=size, decoder_vocab_size=size)
    (folder / "tokenizer.json").unlink()
    return folder


def test_marian_pieces_are_those_of_transformers(marian: Path, tmp_path: Path) -> None:
    run = load_run(import_model(marian, tmp_path / "run").path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it recommends a package that it does not need
        theirs = transformers.MarianTokenizer.from_pretrained(marian)
    ours = run.tokenizer
    assert (ours.pad, ours.bos, ours.eos, ours.unk) == (PAD, PAD, EOS, 3)
    for text in [*ENGLISH[:4], *GERMAN[:4], "", "x?ß", ">>deu<< the tree", ">>xyz<< a tree"]:
        assert [*ours.encode(text), EOS] == theirs(text)["input_ids"]
        assert [*ours.of_targets().encode(text), EOS] == theirs(text_target=text)["input_ids"]
    ids = ours.of_targets().encode(GERMAN[2])
    assert ours.decode([PAD, *ids, EOS]) == theirs.decode([PAD, *ids, EOS], skip_special_tokens=True) == GERMAN[2]
    found, spans = ours.encode_with_offsets(">>deu<< the tree")
    assert found == ours.encode(">>deu<< the tree")
    assert spans[0] == (0, 7)
    assert spans[-1][1] == len(">>deu<< the tree")


def test_marian_runs_write_and_score_with_the_side_s_own_pieces(marian: Path, tmp_path: Path) -> None:
    predictor = load(import_model(marian, tmp_path / "run").path)
    words = predictor.tokenizer
    assert words.encode(GERMAN[0]) != words.of_targets().encode(GERMAN[0])
    assert predictor.score([ENGLISH[0]], [GERMAN[0]])[0].tokens == len(words.of_targets().encode(GERMAN[0])) + 1
    assert len(predictor.translate(ENGLISH[:2], max_length=4)) == 2
    (tmp_path / "again").mkdir()
    write(load_run(tmp_path / "run"), tmp_path / "again", ExportOptions())
    for name in ("vocab.json", "source.spm", "target.spm"):
        held, kept = ((folder / name).read_bytes() for folder in (marian, tmp_path / "again"))
        assert held == kept if name.endswith(".spm") else json.loads(held) == json.loads(kept)


@pytest.mark.parametrize("target", [export_ctranslate2, export_onnx, export_torch])
def test_a_target_of_one_tokenizer_file_refuses_marian_s(target: ModuleType, marian: Path, tmp_path: Path) -> None:
    run = load_run(import_model(marian, tmp_path / "run").path)
    (tmp_path / "out").mkdir()
    with pytest.raises(CapabilityError, match=r"two SentencePiece models, source.spm and target.spm.*--to hf"):
        target.write(run, tmp_path / "out", ExportOptions())


def test_a_vocabulary_without_the_unknown_piece_is_refused(marian: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "source.spm", "target.spm"):
        (tmp_path / name).write_bytes((marian / name).read_bytes())
    with pytest.raises(CheckpointError, match=r"or Marian's vocab.json, source.spm, target.spm, is needed"):
        import_model(tmp_path, tmp_path / "run")
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(DataError, match=r'vocab.json: the vocabulary lacks "<unk>"'):
        import_model(tmp_path, tmp_path / "run")


def test_bart_s_texts_begin_with_the_beginning(tmp_path: Path) -> None:
    make(CASES["bart"], tmp_path / "hf")
    predictor = load(import_model(tmp_path / "hf", tmp_path / "run").path)
    words = predictor.tokenizer
    assert (words.bos, words.eos) == (EOS, EOS)
    assert words.encode("w5 w6") == words.of_targets().encode("w5 w6") == [1, 5, 6]
    assert words.encode_with_offsets("w5") == ([1, 5], [(0, 0), (0, 2)])
    assert words.decode([EOS, 1, 5, 6, EOS]) == "w5 w6"
    assert predictor.score(["w5"], ["w6 w7"])[0].tokens == 4


def test_a_sentencepiece_model(tmp_path: Path) -> None:
    make(CASES["t5"], tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").unlink()
    model = trained(ENGLISH, 46)
    (tmp_path / "hf" / "spiece.model").write_bytes(model)
    (tmp_path / "hf" / "added_tokens.json").write_text('{"<extra>": 90}')
    run = load_run(import_model(tmp_path / "hf", tmp_path / "run").path)
    assert any("added_tokens.json is not read: its 1 tokens (<extra>)" in note for note in run.config.notes.values())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert run.tokenizer.encode(ENGLISH[0]) == processor.encode(ENGLISH[0])
    assert run.tokenizer.decode([VOCABULARY - 1, *run.tokenizer.encode(ENGLISH[1]), EOS]) == ENGLISH[1]
    assert run.tokenizer.vocab_size == VOCABULARY > processor.get_piece_size()
    (tmp_path / "again").mkdir()
    write(run, tmp_path / "again", ExportOptions())
    assert (tmp_path / "again" / "spiece.model").read_bytes() == model
    path = tmp_path / "run" / "tokenizer.json"
    assert Tokenizer.load(path).fingerprint == run.tokenizer.fingerprint
