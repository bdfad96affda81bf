"""The plugin registers when a module is loaded, whoever has asked for it before."""

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

from optimum_cap.plugin.registration import _RegisteringFinder


def test_asking_whether_a_module_is_installed_is_not_loading_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loaded_later.py").write_text("value = 1")
    monkeypatch.syspath_prepend(tmp_path)
    registered = []
    finder = _RegisteringFinder({"loaded_later": lambda: registered.append(True)})
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    # transformers and accelerate ask so whether peft is there.
    for _ in range(2):
        spec = importlib.util.find_spec("loaded_later")
        assert spec is not None
        assert spec.loader is not None
        assert "value" in spec.loader.get_source("loaded_later")  # type: ignore[attr-defined]
    assert not registered
    module = importlib.import_module("loaded_later")
    assert module.value == 1
    assert registered == [True]
    assert finder not in sys.meta_path
    assert type(module.__loader__).__module__ != "optimum_cap.plugin.registration"
    monkeypatch.delitem(sys.modules, "loaded_later")
