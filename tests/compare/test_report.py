"""The report: what report.json holds, and what the pages say."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from synthetic import Fake, edit_summary, replace_plan, write_study

from trilemma.compare.analysis import analyse
from trilemma.compare.plots import all_plots
from trilemma.compare.records import StudyDirectory
from trilemma.compare.report import as_json, render, write_report
from trilemma.compare.results import Report
from trilemma.compare.tables import all_tables, result_table, stability_table, summary_table, triangle_table
from trilemma.errors import CheckpointError
from trilemma.runs import RunDirectory

TWO = {
    "transformer": Fake(accuracy=0.9, slope=0.004, state_per_token=4096.0),
    "lstm": Fake(accuracy=0.5, base_ms=3.0, model={"mixer": "lstm"}, losses=(3.2, 2.4, 2.0, 1.9)),
}
AGAIN, GAP = Fake(accuracy=0.9, seeds=(4, 5, 6)), Fake(accuracy=0.2)
ROLES = {"again": "same-twice", "gap": "known-gap"}


def analysed(directory: StudyDirectory) -> Report:
    """The report without its pages and figures."""
    return analyse(directory.read())


def pages(report: Report) -> list[str]:
    """HTML and Markdown without figures; what Markdown escapes stands there as it is."""
    tables = all_tables(report)
    return [render(f"report.{kind}.j2", report, tables, []).replace("\\", "") for kind in ("html", "md")]


def loaded(directory: StudyDirectory) -> dict:
    return json.loads((directory.path / "report.json").read_text(encoding="utf-8"))


def test_report_json_holds_what_was_promised(tmp_path: Path) -> None:
    directory = write_study(tmp_path, TWO)
    write_report(directory)
    report = loaded(directory)
    assert report["task"] == 'seq2seq: generated "numbers" (5,000 examples)'
    assert report["budget"] == {"lock": "tokens", "amount": 1e6, "match_parameters": True, "tolerance": 0.02}
    assert report["data_hash"] == "d" * 64
    assert report["environment"]["torch"] == "2.13.0"
    assert len(report["verdicts"]) == 1
    transformer, lstm = report["candidates"]
    assert (transformer["name"], transformer["mixer"], transformer["layout"]) == (
        "transformer",
        "attention",
        "encoder-decoder",
    )
    assert lstm["mixer"] == "lstm"
    assert transformer["parameters"] == {"total": 1_200_000, "embedding": 200_000, "non_embedding": 1_000_000}
    quality = transformer["quality"]
    assert (quality["metric"], quality["signature"], quality["seeds"]) == ("exact_match", "exact|v:1", 3)
    assert quality["low"] < quality["mean"] < quality["high"]
    assert quality["mean"] == pytest.approx(sum(quality["by_seed"].values()) / 3)
    assert {"tokens_per_second", "seconds", "flops", "peak_memory_bytes"} <= set(transformer["training"])
    assert transformer["training"]["tokens_per_second"] == pytest.approx(1e4)
    assert transformer["inference"] == {
        "ms_per_token": {"128": pytest.approx(2.512), "512": pytest.approx(4.048), "2048": pytest.approx(10.192)},
        "state_bytes": {"128": 4096 + 128 * 4096, "512": 4096 + 512 * 4096, "2048": 4096 + 2048 * 4096},
    }


def test_the_report_depends_on_nothing_but_the_files(tmp_path: Path) -> None:
    directory = write_study(tmp_path, TWO)
    write_report(directory)
    files = sorted(file for file in tmp_path.rglob("*") if file.is_file())
    before = {file: file.read_bytes() for file in files}
    write_report(StudyDirectory(tmp_path))
    assert {file: file.read_bytes() for file in files} == before


def test_a_planted_difference_is_a_verdict_with_its_scale(tmp_path: Path) -> None:
    report = analysed(write_study(tmp_path, TWO))
    (verdict,) = report.verdicts
    assert re.match(r"transformer is better than lstm: exact match \d\d\.\d\d % against \d\d\.\d\d % \(", verdict)
    assert verdict.endswith("tested at 1 M non-embedding parameters and 1 M scored tokens).")


def test_equals_are_not_distinguishable_and_too_few_seeds_give_no_verdict(tmp_path: Path) -> None:
    same = write_study(tmp_path / "same", {"a": Fake(), "b": Fake()})
    assert analysed(same).verdicts[0].startswith("a and b: not distinguishable with this budget (")
    few = write_study(tmp_path / "few", {"a": Fake(), "b": Fake(accuracy=0.1, seeds=(1, 2))})
    report = analysed(few)
    assert report.verdicts[0].startswith("a and b: no verdict: 2 seeds, three are needed (")
    assert any(line.startswith("2 seeds of some candidates: the luck of initialisation") for line in report.limits)


def test_an_obvious_gap_is_found_among_many_candidates(tmp_path: Path) -> None:
    """Of 276 pairs, those with the one that hardly works: with 10,000 bootstrap draws none could be told apart."""
    fakes = {f"c{at:02d}": Fake(accuracy=0.1 if at == 23 else 0.9) for at in range(24)}
    report = analysed(write_study(tmp_path, fakes, documents=60))
    found = [(pair.first, pair.second) for pair in report.pairs if pair.separated]
    assert found == [(name, "c23") for name in fakes if name != "c23"]


def test_both_controls_passing_leaves_the_verdicts(tmp_path: Path) -> None:
    report = analysed(write_study(tmp_path, {**TWO, "again": AGAIN, "gap": GAP}, roles=ROLES))
    assert [outcome.passed for outcome in report.outcomes] == [True, True]
    assert report.verdicts and not report.withheld


@pytest.mark.parametrize(
    ("again", "gap", "why"),
    [
        (Fake(accuracy=0.4, seeds=(4, 5, 6)), GAP, "A/A control failed: the reference differs from itself"),
        (AGAIN, Fake(accuracy=0.9), "Known-gap control failed: the handicapped reference is not found to be worse"),
        (AGAIN, Fake(accuracy=0.99), "Known-gap control failed"),
    ],
)
def test_a_failed_control_withholds_every_verdict(tmp_path: Path, again: Fake, gap: Fake, why: str) -> None:
    report = analysed(write_study(tmp_path, {**TWO, "again": again, "gap": gap}, roles=ROLES))
    assert report.verdicts == []
    assert report.withheld.startswith("No verdict is printed, because a control failed.")
    assert why in report.withheld


def test_withheld_verdicts_stand_on_no_page(tmp_path: Path) -> None:
    directory = write_study(tmp_path, {**TWO, "gap": Fake(accuracy=0.9)}, roles=ROLES)
    write_report(directory)
    values = loaded(directory)
    assert values["verdicts"] == []
    assert values["pairs"][0]["separated"] is None
    for page in ("report.html", "report.md"):
        text = (tmp_path / page).read_text(encoding="utf-8")
        assert "is better than" not in text
        assert "No verdict is printed" in text


def test_a_control_with_too_few_seeds_cannot_be_judged(tmp_path: Path) -> None:
    directory = write_study(tmp_path, {**TWO, "again": Fake(seeds=(4,))}, roles=ROLES)
    report = analysed(directory)
    (outcome,) = report.outcomes
    assert outcome.passed is None and "cannot be judged: 1 seed, three are needed" in outcome.text
    assert report.verdicts == [] and "undecided. again: cannot be judged: 1 seed" in report.withheld


CONTROLS = {"controls": {"same_twice": True, "known_gap": {"model.positions": "none"}}}


def test_controls_that_have_not_finished_withhold_every_verdict(tmp_path: Path) -> None:
    """A study killed before its controls began: the plan names them or not, no page says that none was asked for."""
    directory = write_study(tmp_path, {**TWO, "again": AGAIN}, roles=ROLES, study=CONTROLS)
    (directory.run_path("08-seed6") / "summary.json").unlink()
    report = analysed(directory)
    values = as_json(report)
    assert values["verdicts"] == [] and values["pairs"][0]["separated"] is None
    for expected in (
        "A/A control has not finished: 2 of 3 runs trained and scored.",
        "Known-gap control has not finished: 0 of 3 runs trained and scored.",
    ):
        assert expected in values["verdicts_withheld"]
        assert expected in [outcome["text"] for outcome in values["controls"]["outcomes"]]
        assert all(expected in text for text in pages(report))
    assert not any("No control was" in text for text in pages(report))


def test_finished_controls_wait_for_the_reference(tmp_path: Path) -> None:
    directory = write_study(tmp_path, {**TWO, "again": AGAIN, "gap": GAP}, roles=ROLES, study=CONTROLS)
    for seed in (1, 2, 3):
        (directory.run_path(f"0{seed - 1}-seed{seed}") / "summary.json").unlink()
    report = analysed(directory)
    assert [outcome.passed for outcome in report.outcomes] == [None, None]
    assert "A/A control cannot be judged: transformer, the reference, has no finished run." in report.withheld
    assert "transformer, the reference, has no finished run: lstm stands in for it." in report.limits


def test_a_ranking_that_flips_is_called_unstable(tmp_path: Path) -> None:
    slow = {"a": Fake(losses=(3.0, 2.5, 2.0, 1.0)), "b": Fake(losses=(2.5, 2.2, 2.0, 1.5))}
    report = analysed(write_study(tmp_path / "flip", slow))
    assert report.stability.rankings == {"quarter": ["b", "a"], "half": ["b", "a"], "full": ["a", "b"]}
    assert report.stability.text.startswith("Ranking by validation loss unstable: b led a earlier and trails later.")
    steady = analysed(write_study(tmp_path / "steady", TWO))
    assert steady.stability.text.startswith("The order by validation loss is the same at a quarter and half")


def test_curves_and_ranks_go_by_the_metric_where_all_measured_it(tmp_path: Path) -> None:
    """The losses would rank them the other way round."""
    fakes = {
        "a": Fake(losses=(3.0, 2.0, 1.5, 1.0), quality=(10.0, 20.0, 25.0, 30.0)),
        "b": Fake(losses=(3.1, 2.1, 1.6, 1.1), quality=(11.0, 21.0, 26.0, 31.0)),
    }
    report = analysed(write_study(tmp_path / "both", fakes))
    assert report.stability.rankings == {share: ["b", "a"] for share in ("quarter", "half", "full")}
    assert report.stability.text.startswith("The order by validation chrF is the same")
    assert [point.value for point in report.candidates[0].curve.points] == [10.0, 20.0, 25.0, 30.0]
    values = as_json(report)
    assert values["rank_stability"]["judged_by"] == "valid_chrf"
    assert values["candidates"][1]["valid_chrf_at_share"] == {"quarter": 11.0, "half": 21.0, "full": 31.0}
    assert stability_table(report).caption == "Validation chrF; mean over seeds; higher is better."
    captions = {plot.name: plot.caption for plot in all_plots(report)}
    assert captions["curves"].startswith("Validation chrF, against tokens, FLOPs and seconds")
    assert captions["stability"].startswith("Rank by validation chrF")


def test_curves_go_by_the_loss_where_one_run_lacks_the_metric(tmp_path: Path) -> None:
    fakes = {"a": Fake(quality=(10.0, 20.0, 25.0, 30.0)), "b": Fake()}
    report = analysed(write_study(tmp_path, fakes))
    assert report.judged.key == "valid_loss" and "by validation loss" in report.stability.text
    assert stability_table(report).caption.startswith("Validation loss, nats per scored token;")


def test_crossovers_are_stated(tmp_path: Path) -> None:
    report = analysed(write_study(tmp_path, TWO))
    by_quantity = {item.quantity: item for item in report.crossovers}
    assert by_quantity["ms per token"].context == pytest.approx(250)  # 2 + 0.004 * 250 = 3
    assert by_quantity["ms per token"].text.startswith("ms per token: lstm needs less than transformer beyond about")
    assert "no crossover; lstm needs less than transformer from 128 to 2,048" in by_quantity["state bytes"].text


def test_corners_are_log_ratios_that_point_to_better(tmp_path: Path) -> None:
    fakes = {"a": Fake(seconds=100.0, base_ms=4.0), "b": Fake(seconds=200.0, base_ms=1.0)}
    _, b = analysed(write_study(tmp_path, fakes)).candidates
    assert b.corners["training"].log2_ratio == pytest.approx(-1.0)
    assert b.corners["inference"].log2_ratio == pytest.approx(2.0)


def test_price_becomes_money(tmp_path: Path) -> None:
    directory = write_study(tmp_path, TWO)
    write_report(directory, price_per_hour=3.6)
    price = loaded(directory)["candidates"][0]["price"]
    assert price["train"] == pytest.approx(100.0 / 3600 * 3.6)
    assert price["per_million_tokens"] == pytest.approx(10.192e-3 * 1e6 / 3600 * 3.6)
    assert price["context"] == 2048
    assert "to train" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_costs_are_compared_where_all_were_measured(tmp_path: Path) -> None:
    """One candidate could not be measured at 2,048: nothing that is printed side by side mixes 512 with 2,048."""
    short = dataclasses.replace(TWO["lstm"], contexts=(128, 512), unmeasured={2048: "too long"})
    directory = write_study(tmp_path, {**TWO, "lstm": short})
    report = analyse(directory.read(), price_per_hour=3.6)
    assert "ms per token and state after 512 tokens" in summary_table(report)
    assert "inference: ms per token after 512" in triangle_table(report).header
    values = as_json(report)
    assert values["inference_context"] == 512
    for row in values["candidates"]:
        cost = row["inference"]["ms_per_token"]["512"]
        assert row["triangle"]["inference"]["value"] == cost
        assert row["price"]["per_million_tokens"] == pytest.approx(cost * 1e-3 * 1e6 / 3600 * 3.6)
        assert row["price"]["context"] == 512
        assert re.search(rf"^{row['name']}.* {cost:.3g} ", summary_table(report), re.M)
    rows = csv.DictReader(result_table(report).csv().splitlines())
    assert [row["context"] for row in rows] == ["512", "512"]
    for text in pages(report):
        assert text.count("after 512 tokens, the most measured for all") == 2
        assert "after 2,048 tokens" not in text


def test_no_shared_context_compares_no_cost(tmp_path: Path) -> None:
    apart = {"a": Fake(contexts=(128,)), "b": Fake(contexts=(512,))}
    report = analyse(write_study(tmp_path, apart).read(), price_per_hour=3.6)
    assert report.context is None and "tokens" not in summary_table(report).splitlines()[-1]
    assert all(row.price.keys() == {"train"} and "inference" not in row.corners for row in report.candidates)
    assert "No context was measured for all candidates" in result_table(report).caption


def test_what_is_unequal_is_listed(tmp_path: Path) -> None:
    directory = write_study(tmp_path, {**TWO, "b": Fake(seeds=(1, 2, 9), unmeasured={8192: "too long"})})
    edit_summary(directory, "00-seed1", order_hash="other", data_hash="e" * 64, tokens=1_100_000)
    edit_summary(directory, "01-seed2", environment={"cpu": "another CPU"})
    texts = [f"{item.candidate}: {item.text}" for item in write_report(directory).inequalities]
    for expected in (
        "all: nothing of note",
        "b: inference at 8,192 tokens was not measured: too long",
        "all: runs were trained on different data (their data hashes differ)",
        "all: seed 1: candidates did not see the examples in the same order",
        "all: environment: cpu differs between runs: a CPU / another CPU",
        "b: finished with seeds [1, 2, 9] of [1, 2, 3]",
        "transformer: spent +10.0% off the locked tokens (worst seed)",
    ):
        assert expected in texts
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "did not see the examples in the same order" in page


def test_a_training_that_was_slowed_down_is_listed(tmp_path: Path) -> None:
    directory = write_study(tmp_path, TWO)
    file = directory.run_path("01-seed2") / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for more, expected in ((10, []), (40, ["transformer"])):  # seconds that the last stretch of 25 took longer
        slower = [*lines[:-1], {**lines[-1], "seconds": lines[-1]["seconds"] + more}]
        file.write_text("".join(json.dumps(line) + "\n" for line in slower), encoding="utf-8")
        found = [item for item in write_report(directory).inequalities if "times of training say little" in item.text]
        assert [item.candidate for item in found] == expected
    assert found[0].text.startswith("its training ran at 3,846 to 10,000 tokens/s")


def test_the_environment_keeps_its_types(tmp_path: Path) -> None:
    directory = write_study(tmp_path, TWO)
    for run in directory.read_plan().runs:
        compiled = run.name == "00-seed1"
        edit_summary(directory, run.name, environment={"cores": 2, "gpu": None, "compile": compiled, "cpu": "A / B"})
    report = analysed(directory)
    expected = {"cores": 2, "gpu": None, "compile": [True, False], "cpu": "A / B"}
    assert json.loads(json.dumps(as_json(report)))["environment"] == expected
    differing = [item.text for item in report.inequalities if item.text.startswith("environment")]
    assert differing == ["environment: compile differs between runs: true / false"]
    html, markdown = pages(report)
    assert "<dt>gpu</dt><dd>none</dd>" in html and "<dt>compile</dt><dd>true / false</dd>" in html
    assert "- gpu: none\n" in markdown and "- cores: 2\n" in markdown


def test_models_that_differ_in_more_than_their_mixer_are_listed(tmp_path: Path) -> None:
    fakes = {
        "transformer": Fake(),
        "dropped": Fake(model={"dropout": 0.5, "mixer": "retention"}),
        "untied": Fake(model={"tie_embeddings": False}, embedding=400_000),
        "fitted": Fake(model={"mixer": "lstm"}, fitted={"d_ff": 777, "num_layers": 3}, embedding=202_000),
    }
    report = analysed(write_study(tmp_path / "free", fakes))
    assert [f"{item.candidate}: {item.text}" for item in report.inequalities if item.candidate != "all"] == [
        "dropped: model.dropout is 0.5, transformer's is 0.1",
        "untied: model.tie_embeddings is false, transformer's is true",
        "untied: 400 k embedding parameters, +100.0% against transformer (embeddings are not matched)",
    ]
    shallow = {"a": Fake(), "b": Fake(model={"num_layers": 2}, fitted={"d_ff": 777})}
    report = analysed(write_study(tmp_path / "depth", shallow))
    assert "model.num_layers is 2, a's is 4" in [item.text for item in report.inequalities]
    assert not any("d_ff" in item.text for item in report.inequalities)


def test_unfinished_runs_are_named(tmp_path: Path) -> None:
    directory = write_study(tmp_path, TWO)
    (directory.run_path("05-seed3") / "summary.json").unlink()
    report = write_report(directory)
    assert [run.name for run in report.missing] == ["05-seed3"]
    assert "Incomplete: 1 planned run not finished" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_learning_rates_are_drawn(tmp_path: Path) -> None:
    directory = write_study(tmp_path, {"a": Fake(seeds=(1,)), "b": Fake(seeds=(1,))}, study={"learning_rates": [1e-3]})
    replace_plan(directory, sweep_notes={"a": "0.001 was best of 0.001"})
    report = write_report(directory)
    assert [(point.candidate, point.learning_rate, point.chosen) for point in report.sweep] == [
        ("a", 1e-3, True),
        ("b", 1e-3, True),
    ]
    assert (tmp_path / "plots" / "learning_rates.png").read_bytes().startswith(b"\x89PNG")
    assert "0.001 was best of 0.001" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_every_plot_is_png_and_svg_and_every_table_is_csv(tmp_path: Path) -> None:
    directory = write_study(tmp_path, TWO)
    write_report(directory)
    for name in ("triangle", "quality", "curves", "inference", "stability"):
        assert (tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (tmp_path / "plots" / f"{name}.svg").read_bytes()
    for name, rows in (("results", 2), ("curves", 8), ("inference", 6), ("pairs", 1), ("samples", 1)):
        with (tmp_path / "tables" / f"{name}.csv").open(encoding="utf-8", newline="") as stream:
            assert len(list(csv.DictReader(stream))) == rows


def test_a_folder_without_a_study_and_a_study_without_results_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no study here \(study.yaml is missing\)"):
        write_report(StudyDirectory(tmp_path))
    directory = write_study(tmp_path / "study", TWO)
    for run in directory.read_plan().runs:
        (directory.run_path(run.name) / "summary.json").unlink()
    with pytest.raises(CheckpointError, match="nothing to report"):
        write_report(directory)


def test_an_altered_result_is_named_and_never_read(tmp_path: Path) -> None:
    directory = write_study(tmp_path, TWO)
    file = directory.run_path("00-seed1") / "documents.json"
    file.write_bytes(file.read_bytes().replace(b"1.0", b"0.0", 1))
    with pytest.raises(CheckpointError, match=r"documents\.json"):
        analysed(directory)


def test_the_first_form_of_an_inference_file_is_still_read(tmp_path: Path) -> None:
    directory = write_study(tmp_path, TWO)
    now = directory.read_inference("00-seed1")
    points = json.dumps([dataclasses.asdict(point) for point in now.points]).encode()
    RunDirectory.open(directory.run_path("00-seed1")).publish({"inference.json": points})
    assert directory.read_inference("00-seed1") == now


def test_runs_scored_on_different_documents_are_refused(tmp_path: Path) -> None:
    directory = write_study(tmp_path, TWO)
    documents = directory.read_documents("00-seed1")
    assert documents is not None
    shorter = dataclasses.replace(documents, statistics=documents.statistics[:-1])
    directory.write_documents("00-seed1", shorter)
    with pytest.raises(CheckpointError, match="exact_match on 199 documents; exact_match on 200 doc"):
        write_report(directory)
