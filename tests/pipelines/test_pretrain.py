"""`pretrain`: settings of the model that is not trained are refused, and the upscaler's work is counted."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("words", "idle"),
    [
        (("model=upscaler", "denoiser.num_steps=30"), "denoiser"),
        (("upscaler.num_steps=30",), "upscaler"),
    ],
)
def test_settings_without_effect_are_refused(run, tmp_path, words, idle):
    code, _, err = run("pretrain", f"output={tmp_path / 'out'}", *words)
    assert (code, f"the settings of {idle} have no effect" in err) == (2, True), err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_counts(run, tmp_path):
    code, summary, err = run("pretrain", f"output={tmp_path / 'out'}", "model=upscaler", "--dry-run")
    assert code == 0, err
    assert summary["num_stills"] == 400
    assert summary["num_parameters"]["denoiser"] < 2_000_000
