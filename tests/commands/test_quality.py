import json
from pathlib import Path

import pytest
from PIL import Image

from serve_app.__main__ import main
from serve_app.commands import quality_plot

DATA = Path(__file__).parents[1] / "data"
FOLDER = DATA / "models" / "stories3M" / "hf"
TEXT = DATA / "models" / "stories3M" / "sampled_text.txt"


def measure(*options: str, model: Path = FOLDER) -> int:
    return main(["quality", "-m", str(model), "--threads", "1", *options])


def test_the_table_the_json_and_the_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calibration = tmp_path / "text.txt"
    calibration.write_text(TEXT.read_text(encoding="utf-8")[-4000:], encoding="utf-8")
    figures, plot = tmp_path / "q.json", tmp_path / "q.png"
    options = ["--isq", "Q2K,HQQ4,Q8_0", "--chunks", "2", "--chunk-tokens", "128", "--text", str(TEXT)]
    options += ["--calibration-file", str(calibration), "--json", str(figures), "--plot", str(plot)]
    assert measure(*options) == 0
    report = json.loads(figures.read_text())
    assert (report["chunk_tokens"], report["num_tokens"], report["text"]) == (128, 2 * 63, "sampled_text.txt")
    assert report["reference"]["bits_per_weight"] == 32
    rows = {(row["type"], row["has_importance"]): row for row in report["types"]}
    assert list(rows) == [("Q2_K", False), ("Q2_K", True), ("HQQ4", False), ("Q8_0", False)]
    plain, weighted = rows["Q2_K", False], rows["Q2_K", True]
    assert plain["bits_per_weight"] == weighted["bits_per_weight"] == pytest.approx(3.075)
    assert plain["kl_divergence"] != weighted["kl_divergence"]
    worst_first = sorted(rows, key=lambda key: -rows[key]["kl_divergence"])
    assert [name for name, _ in worst_first] == ["Q2_K", "Q2_K", "HQQ4", "Q8_0"]
    assert rows["Q8_0", False]["top1_agreement"] > 0.95 > plain["top1_agreement"] > 0.5
    assert rows["Q8_0", False]["weight_bytes"] == 8.5 / 32 * report["reference"]["weight_bytes"] == 3481600
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("as it is", "HQQ4", "same top token", "importance", "8.50"))
    with Image.open(plot) as image:
        assert image.size == (880, 605)
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 20


def test_a_gguf_and_the_text_that_comes_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = DATA / "models" / "stories260K" / "stories260K-F32.gguf"
    assert measure("--isq", "Q4_0,8", "--chunks", "1", "--json", str(tmp_path / "q.json"), model=source) == 0
    report = json.loads((tmp_path / "q.json").read_text())
    assert (report["text"], report["num_tokens"], report["model"]) == ("stories.txt", 255, "stories260K-F32")
    assert [row["type"] for row in report["types"]] == ["Q4_0", "Q8_0"]
    assert "stories260K-F32: 255 tokens of stories.txt, chunks of 512" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--isq", "Q9K"], "unknown quantisation type 'Q9K'"),
        (["--isq", ","], "--isq names no type"),
        (["--isq", "Q4K", "--chunk-tokens", "513"], "513 are more than the model's 512"),
        (["--isq", "Q4K", "--text", "missing.txt"], "--text: missing.txt cannot be read"),
        (["--isq", "Q4K", "--plot", "a.bmp"], "a.bmp ends in none of"),
        (["--isq", "Q4K", "--json", "missing/a.json"], "there is no folder missing"),
        (["--isq", "Q4K", "--isq-organization", "other"], "'other' is not one of 'default', 'pure'"),
        (["--isq", "Q4K", "--imatrix", "a", "--calibration-file", "b"], "choose one"),
        (["--isq", "Q4_K_M", "--isq-organization", "pure"], "it cannot be pure"),
    ],
)
def test_mistakes_are_one_sentence(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure(*options) == 2
    assert message in capsys.readouterr().err


def test_short_texts_and_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Once upon a time", encoding="utf-8")
    assert measure("--isq", "Q4K", "--text", str(short)) == 2
    assert "the text is shorter than one chunk of 512 tokens" in capsys.readouterr().err
    short.write_bytes(b"Once \xff")
    assert measure("--isq", "Q4K", "--text", str(short)) == 2
    assert "is no text in UTF-8 (byte 5)" in capsys.readouterr().err


def test_plotting_needs_an_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(quality_plot, "find_spec", lambda name: None)
    assert measure("--isq", "Q4K", "--plot", "a.png") == 2
    assert "needs matplotlib: install Sirocco with the extra plot" in capsys.readouterr().err
