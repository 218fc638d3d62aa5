"""`useg predict` refuses options that its mode does not use, and loads only what it needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from useg.cli import main


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run ``useg predict``, which must exit with status 2; returns its one sentence."""
    with pytest.raises(SystemExit) as ended:
        main(["predict", *map(str, arguments)])
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--rank", "--coco"], "--coco"),
        (["--rank", "--labels", "tif", "--areas"], "--labels tif, --areas"),
        (["--rank", "--augment", "flip"], "--augment"),
        (["--rank", "--shard", "1/2"], "--shard"),
        (["--rank", "--cluster", "local"], "--cluster"),
        (["--cluster", "local", "--probabilities", "uint8"], "--probabilities"),
        (["--cluster", "local", "--confidence", "png"], "--confidence"),
        (["--cluster", "local", "--polygons"], "--polygons"),
        (["--cluster", "local", "--min-region", "3"], "--min-region"),
        (["--cluster", "local", "--max-hole", "3"], "--max-hole"),
        (["--cluster", "local", "--overwrite"], "--overwrite"),
        (["--cluster", "local", "--smooth", "0.5"], "--smooth"),
    ],
)
def test_an_option_that_the_mode_does_not_use_is_refused(
    options: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, "RUN", "images", "--out", tmp_path / "out", *options)
    assert f"useg: {named} do" in said
    assert "not apply to " + options[0] in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", [["--rank"], ["--cluster", "local"]])
def test_a_video_is_refused_where_only_images_are_taken(
    mode: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, "RUN", "drive.mp4", "images", "--out", tmp_path / "out", *mode)
    assert "a video does not apply to " + mode[0] in said


def test_options_for_images_are_refused_for_videos_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, "RUN", "drive.mp4", "--out", tmp_path / "out", "--coco", "--areas")
    assert "--coco, --areas do not apply to videos alone" in said


def test_smoothing_is_refused_without_a_video(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, "RUN", "images", "--out", tmp_path / "out", "--smooth", "0.5")
    assert "--smooth applies to videos, and no source is one" in said


def test_workers_are_refused_without_a_cluster(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, "RUN", "images", "--out", tmp_path / "out", "--workers", "2")
    assert "--workers applies to --cluster, which is not given" in said


def test_a_second_run_counts_what_is_up_to_date(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(__file__).parent / "golden" / "old" / "valid.safetensors"
    scenes, out = tmp_path / "scenes", tmp_path / "out"
    with pytest.raises(SystemExit):
        main(["scenes", str(scenes), "--count", "1", "--size", "64x48"])
    for summary in (
        f"1 label map in {out}, computed by torch",
        f"1 label map in {out}, 1 of them already up to date, computed by torch",
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["predict", str(model), str(scenes / "CameraRGB"), "--out", str(out), "--quiet"])
        assert ended.value.code == 0
        assert capsys.readouterr().out == summary + "\n"


# Each of them takes 20 to 1,000 milliseconds to import, and one picture needs none of them.
NOT_FOR_ONE_PICTURE = (
    *("cv2", "jinja2", "matplotlib", "nncf", "onnx", "onnxruntime", "openvino", "pandas", "scipy"),
    *("sympy", "rich.markdown", "torch._dynamo", "torch._inductor", "torch.onnx"),
    *("useg.data", "useg.labelling", "useg.reporting", "useg.scenes", "useg.serving"),
    "useg.training",
)


def test_labelling_one_picture_imports_nothing_that_it_does_not_need(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["scenes", str(tmp_path / "scenes"), "--count", "1", "--size", "64x48"])
    model = Path(__file__).parent / "golden" / "old" / "valid.safetensors"
    command = ["predict", model, tmp_path / "scenes" / "CameraRGB", "--out", tmp_path / "out"]
    code = f"""
import sys
from useg.cli import main
try: main({[str(word) for word in command]!r})
except SystemExit as ended: print("STATUS", ended.code)
print("IMPORTED", [name for name in {NOT_FOR_ONE_PICTURE} if name in sys.modules])
"""
    printed = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    assert printed.splitlines()[-2:] == ["STATUS 0", "IMPORTED []"]
