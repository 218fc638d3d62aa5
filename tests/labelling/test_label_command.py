"""The command ``useg label``: what it refuses, where it listens, and how it opens a browser."""

from __future__ import annotations

import webbrowser
from pathlib import Path

import pytest
from made_labelling import write_images

from useg.cli import main
from useg.labelling import app


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{tmp}/nowhere"], "is not a folder; give the folder that contains the images"),
        (["{tmp}/empty"], "contains no images"),
        (["{tmp}/images", "--classes", "a,a"], "--classes 'a,a' contains 'a' twice"),
        (["{tmp}/images", "--model", "x", "--from", "y"], "--model and --from cannot be combined"),
        (["{tmp}/images", "--from", "{tmp}/no-run"], "no-run"),
        (["{tmp}/images", "--masks", "{tmp}"], "the masks would be mixed with the images"),
    ],
)
def test_what_cannot_be_labelled_is_refused_in_a_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path, 1)
    (tmp_path / "empty").mkdir()
    filled = [argument.format(tmp=tmp_path) for argument in arguments]
    with pytest.raises(SystemExit) as ended:
        main(["label", *filled, "--no-open"])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert sentence in printed.err


def test_the_address_is_one_line_with_a_token_on_this_machine_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, served, shown = [], [], []
    monkeypatch.setattr(
        webbrowser, "open", lambda url: opened.append((url, Path(url[7:]).read_text()))
    )
    monkeypatch.setattr(app.signal, "signal", lambda *_: None)
    monkeypatch.setattr(
        app.LabelServer, "run", lambda _, sockets: served.append(sockets[0].getsockname())
    )
    for browse in (False, True):
        options = app.LabelOptions(write_images(tmp_path / str(browse), 1), ("a", "b"))
        app.serve_labelling_page(options, shown.append, shown.append, browse=browse)
    assert [address[0] for address in served] == ["127.0.0.1"] * 2
    tokens = []
    for url, (_, port) in zip(shown, served, strict=True):
        start, _, token = url.partition("/?token=")
        assert start == f"http://127.0.0.1:{port}"
        tokens.append(token)
    assert len(set(tokens)) == 2
    assert all(len(token) >= 32 for token in tokens)
    # Other users can list the arguments of processes, which a browser gets.
    [(address, content)] = opened
    assert tokens[1] not in address
    assert tokens[1] in content
    assert not Path(address[7:]).exists()
